"""Paths as users write them: ~ for the home directory, which not every environment has, and any bytes in a name."""

import os
from pathlib import Path

from minigpt_pl.runtime.errors import UserError

NOWHERE = Path(os.devnull, "minigpt")
"""No directory can be made there: the place of a cache where there is no home directory."""


def expand_home(path: str, option: str) -> Path:
    """The path with ~ replaced.

    Raises:
        UserError: If there is no such home directory; `option` is named then.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        remedy = "write the whole path, or set HOME"
        raise UserError("the home directory is not known", option=option, value=path, remedy=remedy) from None


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/minigpt`, else `~/.cache/minigpt`, else NOWHERE."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minigpt")
    except RuntimeError:
        return NOWHERE


def printable(name: str) -> str:
    """A name without the bytes that are not UTF-8, for libraries that send it as text."""
    return name.encode("utf-8", "replace").decode("utf-8")
