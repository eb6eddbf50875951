"""Reads text files: UTF-8 without BOM, CRLF turned into LF, in chunks, each chunk within one split.

Several files are one text, joined by a newline each. Every problem with a file itself is reported here. Which files
there are is in `sources`; how characters become tokens is in `tokenizer` and `token_cache`.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from minigpt_pl.runtime.atomic_io import atomic_write
from minigpt_pl.runtime.errors import UserError, is_rank_zero

CHUNK_BYTES = 1 << 20
LARGE_FILE_BYTES = 50_000_000  # reading a larger file shows a progress bar, and its tokens do not stay in memory
NUL_PATTERN = re.compile(rb"(?:[^\0]\0{3}|\0{3}[^\0]){8}|(?:[^\0]\0){8}|(?:\0[^\0]){8}")
"""Eight characters of UTF-32 or UTF-16 without a byte-order mark, which are valid UTF-8 too."""


@dataclass(frozen=True)
class TextStats:
    """What one pass over a text measures; sha256 is that of the converted text in UTF-8."""

    sha256: str
    characters: int
    bytes: int
    alphabet: str
    file_characters: Sequence[int]  # of each file, without the newlines between them


def text_error(path: Path, problem: str, remedy: str = "name a text file") -> UserError:
    return UserError(problem, option="data.path", value=path, remedy=remedy)


def iter_chunks(path: Path, progress: str) -> Iterator[str]:
    """The converted text in chunks of about CHUNK_BYTES bytes; `progress` labels the bar of a large file, if not "".

    Raises:
        UserError: If the file is missing, unreadable, a directory or device, UTF-16 or not UTF-8.
    """
    if path.is_dir():
        raise text_error(path, "it is a directory")
    if path.exists() and not path.is_file():
        raise text_error(path, "it is not a regular file, and the text is read more than once", "save it in a file")
    try:
        size = path.stat().st_size
        quiet = size < LARGE_FILE_BYTES or not progress or not is_rank_zero()
        with path.open("rb") as file, tqdm(total=size, desc=progress, unit="B", unit_scale=True, disable=quiet) as bar:
            yield from _decode(path, file, bar)
    except FileNotFoundError:
        raise text_error(path, "the file does not exist") from None
    except OSError as error:
        raise text_error(path, f"it cannot be read ({error.strerror})") from None


def _decode(path: Path, file: BinaryIO, bar: tqdm) -> Iterator[str]:
    start = file.read(len(codecs.BOM_UTF8))
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise text_error(path, "it is UTF-16, by its first two bytes", "convert it to UTF-8")
    if start != codecs.BOM_UTF8:
        file.seek(0)
    decoder, rest, data = codecs.getincrementaldecoder("utf-8")(), "", b" "
    while data:
        offset = file.tell() - len(decoder.getstate()[0])
        data = file.read(CHUNK_BYTES)
        if b"\0" in data and (found := NUL_PATTERN.search(data)):
            kind = "UTF-32" if found[0].count(0) > len(found[0]) // 2 else "UTF-16"
            problem = f"it looks like {kind}: from byte {offset + found.start()} on, it has regular NUL bytes"
            raise text_error(path, problem, "convert it to UTF-8")
        try:
            text = rest + decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            byte = f"byte {offset + error.start} is 0x{error.object[error.start]:02x}"
            raise text_error(path, f"it is not UTF-8: {byte}", "convert it to UTF-8") from None
        rest = "\r" if data and text.endswith("\r") else ""  # the next chunk may begin with its LF
        if text := text[: len(text) - len(rest)].replace("\r\n", "\n"):
            yield text
        bar.update(len(data))


def iter_joined_chunks(files: Sequence[Path], progress: str) -> Iterator[str]:
    """The chunks of all files, with a newline between two files; raises as `iter_chunks`."""
    for number, path in enumerate(files):
        if number:
            yield "\n"
        yield from iter_chunks(path, progress)


def iter_split_chunks(files: Sequence[Path], ends: Sequence[int], progress: str) -> Iterator[tuple[int, str]]:
    """Chunks of the text with the index of their split; split i ends at character `ends[i]`."""
    position, split, last = 0, 0, len(ends) - 1
    for chunk in iter_joined_chunks(files, progress):
        while chunk:
            while split < last and position >= ends[split]:
                split += 1
            head = chunk if split == last else chunk[: ends[split] - position]
            yield split, head
            position, chunk = position + len(head), chunk[len(head) :]


def code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def read_stats(files: Sequence[Path], cache: Path) -> TextStats:
    """Reads the whole text; the result is kept in `cache`, if possible, until a file's size, times or inode change.

    Raises:
        UserError: As `iter_chunks`, and if the text is empty or blank.
    """
    entry = None
    with suppress(OSError):
        stats = [(path.resolve(), path.stat()) for path in files]
        key = "/".join(f"{p}/{s.st_size}/{s.st_mtime_ns}/{s.st_ctime_ns}/{s.st_ino}" for p, s in stats)
        entry = cache / f"text-{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.json"
        with suppress(ValueError, TypeError):  # a damaged entry
            return TextStats(**json.loads(entry.read_text("utf-8")))

    digest, size, blank = hashlib.sha256(), 0, True
    seen, lengths = np.zeros(0x110000, bool), []  # by code point
    for number, path in enumerate(files):
        characters = 0
        for part, chunk in enumerate(chain(["\n"] if number else [""], iter_chunks(path, "reading the text"))):
            data = chunk.encode()
            digest.update(data)
            size, blank = size + len(data), blank and (chunk.isspace() or not chunk)
            characters += len(chunk) if part else 0
            seen[code_points(chunk)] = True
        lengths.append(characters)
    characters = sum(lengths) + len(files) - 1
    if blank:
        problem = f"it has {characters} characters, all white space" if characters else "it is empty"
        raise text_error(files[0], problem, "name another text file")
    found = TextStats(digest.hexdigest(), characters, size, "".join(map(chr, np.flatnonzero(seen))), lengths)
    if entry is not None:
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            atomic_write(entry, json.dumps(asdict(found)).encode())
    return found
