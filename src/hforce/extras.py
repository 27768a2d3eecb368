"""Optional packages: imported when they are needed, and how to get one that is missing."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hforce.errors import UnavailableError


def optional(module: str, extra: str) -> Any:
    """The module, which comes with `pip install "hforce[extra]"`. Raises UnavailableError where it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        message = f"{module.partition('.')[0]} is not installed, or cannot be imported: {error}"
        raise UnavailableError(message, f'pip install "hforce[{extra}]"') from error


def require(extra: str, *modules: str) -> None:
    """Raises UnavailableError unless all these modules are installed; imports none of them."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise UnavailableError(f"not installed: {', '.join(missing)}", f'pip install "hforce[{extra}]"')
