"""Settings that every test shares."""

from hypothesis import settings

settings.register_profile("hforce", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("hforce")
