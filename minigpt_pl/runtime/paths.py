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


def home_for(libraries: Path) -> dict[str, str]:
    """Environment variables under which libraries that keep files below the home directory find another place.

    Empty where they can be written there. A home that can only be read stays: it may have keys and settings.
    """
    try:
        cache = Path.home() / ".cache"
        cache.mkdir(exist_ok=True)
    except RuntimeError:
        return {"HOME": str(libraries)}
    except OSError:
        return {"WANDB_CACHE_DIR": str(libraries)}
    return {} if os.access(cache, os.W_OK) else {"WANDB_CACHE_DIR": str(libraries)}


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/minigpt`, else `~/.cache/minigpt`, else NOWHERE."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minigpt")
    except RuntimeError:
        return NOWHERE
