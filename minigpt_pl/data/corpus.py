"""A text file as the project sees it: UTF-8 without BOM, CRLF turned into LF, read piece by piece, cut into parts.

Everything that can be wrong with the file is said here. What its characters become is in `tokenizer` and `tokens`.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from minigpt_pl.runtime.atomic_io import atomic_write
from minigpt_pl.runtime.errors import UserError, is_rank_zero

CHUNK_BYTES = 1 << 20
"""Bytes that are read at a time."""
LARGE_FILE_BYTES = 50_000_000
"""Bytes above which reading a file shows a bar, and its tokens do not stay in memory."""


@dataclass(frozen=True)
class TextStats:
    """What one pass over a text tells; sha256 is that of the converted text in UTF-8."""

    sha256: str
    characters: int
    bytes: int
    alphabet: str


def iter_chunks(path: Path, doing: str) -> Iterator[str]:
    """The converted text, in order, in pieces of at most PIECE bytes or a few more.

    Args:
        path: The text file.
        doing: What the text is read for, as the bar of a large file says it; "" for no bar.

    Raises:
        InputError: If the file is missing, unreadable, a directory or device, UTF-16 or not UTF-8.
    """
    if path.is_dir():
        raise UserError(f"data.path {path} is a directory: name a text file")
    if path.exists() and not path.is_file():
        raise UserError(f"data.path {path} is no regular file, and a text is read more than once: save it in a file")
    try:
        size = path.stat().st_size
        quiet = size < LARGE_FILE_BYTES or not doing or not is_rank_zero()
        with path.open("rb") as file, tqdm(total=size, desc=doing, unit="B", unit_scale=True, disable=quiet) as bar:
            yield from _decoded(path, file, bar)
    except FileNotFoundError:
        raise UserError(f"data.path {path} does not exist: name a text file") from None
    except OSError as error:
        raise UserError(f"data.path {path} cannot be read ({error.strerror}): name a text file") from None


def _decoded(path: Path, file: BinaryIO, bar: tqdm) -> Iterator[str]:
    mark = file.read(len(codecs.BOM_UTF8))
    if mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"data.path {path} is UTF-16, by its first two bytes: convert it to UTF-8")
    if mark != codecs.BOM_UTF8:
        file.seek(0)
    decoder, held = codecs.getincrementaldecoder("utf-8")(), ""
    chunk = b" "
    while chunk:
        begin = file.tell() - len(decoder.getstate()[0])
        chunk = file.read(CHUNK_BYTES)
        try:
            text = held + decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            wrong = f"byte {begin + error.start} is 0x{error.object[error.start]:02x}"
            raise UserError(f"data.path {path} is not UTF-8: {wrong}; convert the file to UTF-8") from None
        held = "\r" if chunk and text.endswith("\r") else ""  # its LF may follow
        if text := text[: len(text) - len(held)].replace("\r\n", "\n"):
            yield text
        bar.update(len(chunk))


def iter_split_chunks(path: Path, ends: list[int], doing: str) -> Iterator[tuple[int, str]]:
    """Pieces of the text, each with the number of its part; `ends` are where parts end, in characters."""
    place, part = 0, 0
    for piece in iter_chunks(path, doing):
        while piece:
            while part < len(ends) - 1 and place >= ends[part]:
                part += 1
            inside = piece if part == len(ends) - 1 else piece[: ends[part] - place]
            yield part, inside
            place, piece = place + len(inside), piece[len(inside) :]


def code_points(text: str) -> NDArray[np.uint32]:
    """The text as code points."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def read_stats(path: Path, cache: Path) -> TextStats:
    """Reads the whole text once; a file of unchanged size, times and inode is not read again.

    Args:
        path: The text file.
        cache: Where results are remembered, if it can be written.

    Raises:
        InputError: As `pieces`, and if the text is empty or blank.
    """
    note = None
    with suppress(OSError):
        stat = path.stat()
        name = f"{path.resolve()}/{stat.st_size}/{stat.st_mtime_ns}/{stat.st_ctime_ns}/{stat.st_ino}"
        note = cache / f"text-{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
        with suppress(ValueError, TypeError):  # a damaged note
            return TextStats(**json.loads(note.read_text("utf-8")))

    digest, characters, size, blank = hashlib.sha256(), 0, 0, True
    seen = np.zeros(0x110000, bool)
    for piece in iter_chunks(path, "reading the text"):
        data = piece.encode()
        digest.update(data)
        characters, size, blank = characters + len(piece), size + len(data), blank and piece.isspace()
        seen[code_points(piece)] = True
    if characters == 0:
        raise UserError(f"data.path {path} is empty: name another text file")
    if blank:
        raise UserError(f"data.path {path} is blank, {characters} characters of white space: name another text file")
    info = TextStats(digest.hexdigest(), characters, size, "".join(map(chr, np.flatnonzero(seen))))
    if note is not None:
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            atomic_write(note, json.dumps(asdict(info)).encode())
    return info
