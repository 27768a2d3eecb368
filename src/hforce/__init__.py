"""hforce: a memory for every attention head, for minute-long video from short-clip models."""

__version__ = "0.1.0"
