"""Which files a text consists of, and how they are cut into splits.

How files are read is in `corpus`, how their tokens are cached in `token_cache`.
"""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from minigpt_pl.data.corpus import TextStats, text_error
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.paths import expand_home

PACKAGE = Path(__file__).parents[1]
TextPath = str | list[str]
"""A file, a directory or a glob, or a list of such."""
SplitMode = Literal["joint", "per_file"]


class Segment(NamedTuple):
    """Consecutive files that are cut into splits as one text; `ends` is where each split ends, in characters."""

    files: tuple[Path, ...]
    ends: tuple[int, ...]


def find_files(path: TextPath, remembered: TextPath = "") -> tuple[Path, ...]:
    """The files of a text, in sorted order; files that are missing stay in it, and reading them reports that.

    Args:
        path: As the user gave it. A relative path is looked up in the working directory, then among the shipped files.
        remembered: Where the run of a checkpoint read the text; used if there is nothing at a relative `path`.

    Raises:
        UserError: If a directory or a glob has no files.
    """
    if not path:
        raise UserError("it names no file", option="data.path", value=path, remedy="name a text file")
    if isinstance(path, list):
        return tuple(sorted({file for entry in path for file in find_files(entry)}))
    place = expand_home(path, "data.path")
    if not place.exists() and glob.has_magic(path):
        found = [Path(name) for name in glob.glob(str(place), recursive=True)]
        return _files(place, [file for file in found if file.is_file()], "no file matches it")
    if not place.exists() and not place.is_absolute():
        place = next(
            (other for other in (PACKAGE / "shipped" / place, PACKAGE.parent / place) if other.exists()), place
        )
        if not place.exists() and remembered:
            return tuple(map(Path, [remembered] if isinstance(remembered, str) else remembered))
    if place.is_dir():
        found = [file for file in place.rglob("*") if file.is_file()]
        visible = [file for file in found if not any(part.startswith(".") for part in file.relative_to(place).parts)]
        return _files(place, visible, "the directory has no files")
    return (place,)


def _files(place: Path, found: list[Path], problem: str) -> tuple[Path, ...]:
    if not found:
        raise text_error(place, problem, "name text files")
    return tuple(sorted(found))


def cut(files: tuple[Path, ...], stats: TextStats, shares: tuple[float, ...], mode: SplitMode) -> list[Segment]:
    """The segments of a text: one of all files, or with per_file one a file. Split i ends at share `shares[i]`."""
    if mode == "joint":
        return [Segment(files, split_ends(shares, stats.characters))]
    lengths = stats.file_characters
    return [Segment((file,), split_ends(shares, length)) for file, length in zip(files, lengths, strict=True)]


def split_ends(shares: Sequence[float], length: int) -> tuple[int, ...]:
    """Where each split ends, in a text of `length` characters or tokens; the last one ends with the text."""
    return (*(int(share * length) for share in shares), length)
