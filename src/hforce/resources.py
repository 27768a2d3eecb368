"""Files that come with hforce, found in an installed package and in a checkout alike."""

from pathlib import Path

from hforce.errors import InputError


def resource(name: str) -> Path:
    """Path of a shipped file such as "profiles/tiny.json", "prompts/demo.txt" or "presets/tiny.yaml".

    Looks into the package, then into the package's `data` folder (where a wheel puts `profiles` and `prompts`),
    then beside `src` (where a checkout has them). Raises InputError when none of them has it.
    """
    package = Path(__file__).parent
    for folder in (package, package / "data", package.parent.parent):
        path = folder / name
        if path.is_file():
            return path
    raise InputError(f"{name} is missing from this installation of hforce", "install hforce again")


def presets() -> dict[str, Path]:
    """The files of the presets by name, sorted."""
    return {path.stem: path for path in sorted(resource("presets/tiny.yaml").parent.glob("*.yaml"))}
