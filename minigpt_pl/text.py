"""A text file as the project sees it: UTF-8 without BOM, CRLF turned into LF, read piece by piece.

Everything that can be wrong with the file is said here. What its characters become is in `tokenizer` and `data`.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minigpt_pl.errors import InputError

PIECE = 1 << 24
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class TextInfo:
    """What one pass over a text tells; sha256 is that of the converted text in UTF-8."""

    sha256: str
    characters: int
    bytes: int
    alphabet: str


def pieces(path: Path) -> Iterator[str]:
    """The converted text, in order, in pieces of about PIECE bytes.

    Raises:
        InputError: If the file is missing, unreadable, a directory, UTF-16 or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            yield from _decode(path, file.read(PIECE), iter(lambda: file.read(PIECE), b""))
    except IsADirectoryError:
        raise InputError(f"data.path {path} is a directory: name a text file") from None
    except FileNotFoundError:
        raise InputError(f"data.path {path} does not exist: name a text file") from None
    except PermissionError:
        raise InputError(f"data.path {path} cannot be read: permission denied") from None
    except OSError as error:
        raise InputError(f"data.path {path} cannot be read: {error.strerror}") from None


def _decode(path: Path, first: bytes, rest: Iterator[bytes]) -> Iterator[str]:
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"data.path {path} is UTF-16, by its first two bytes: convert it to UTF-8")
    decoder, offset, carried = codecs.getincrementaldecoder("utf-8")(), 0, ""
    chunk = first
    while True:
        pending = len(decoder.getstate()[0])
        try:
            text = carried + decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            place = offset - pending + error.start
            raise InputError(
                f"data.path {path} is not UTF-8: byte {place} is 0x{error.object[error.start]:02x}; convert the file"
            ) from None
        if offset == 0:
            text = text.removeprefix("\ufeff")
        carried = "\r" if chunk and text.endswith("\r") else ""  # its LF may follow
        if text := text[: len(text) - len(carried)].replace("\r\n", "\n"):
            yield text
        if not chunk:
            return
        offset += len(chunk)
        chunk = next(rest, b"")


def code_points(text: str) -> np.ndarray:
    """The text as uint32 code points."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def scan(path: Path, cache: Path | None) -> TextInfo:
    """Reads the whole text once; a file of unchanged size, time and inode is not read again.

    Args:
        path: The text file.
        cache: Where results are remembered, or None.

    Raises:
        InputError: As `pieces`, and if the text is empty or blank.
    """
    note = None
    if cache is not None and path.is_file():
        stat = path.stat()
        name = f"{path.resolve()}/{stat.st_size}/{stat.st_mtime_ns}/{stat.st_ino}"
        note = cache / f"text-{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
        try:
            return TextInfo(**json.loads(note.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            pass  # not seen before, or not whole: read the text

    digest, characters, size, blank = hashlib.sha256(), 0, 0, True
    seen = np.zeros(0x110000, bool)
    for piece in pieces(path):
        data = piece.encode()
        digest.update(data)
        characters, size, blank = characters + len(piece), size + len(data), blank and piece.isspace()
        seen[code_points(piece)] = True
    if characters == 0:
        raise InputError(f"data.path {path} is empty: name a text file with something to learn in it")
    if blank:
        raise InputError(f"data.path {path} is blank, {characters} characters of white space: there is nothing to learn")
    info = TextInfo(digest.hexdigest(), characters, size, "".join(map(chr, np.flatnonzero(seen))))
    if note is not None:
        write_atomically(note, json.dumps(asdict(info)).encode())
    return info


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a small file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
