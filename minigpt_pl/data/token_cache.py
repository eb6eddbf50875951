"""The token ids of a text's parts: made piece by piece, kept in a file that later starts map, or else in memory.

What a token is is in `tokenizer`, where parts end in `data`.
"""

import hashlib
import io
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from minigpt_pl.data.corpus import LARGE_FILE_BYTES, TextStats, iter_split_chunks
from minigpt_pl.data.tokenizer import MAX_LINE_CHARACTERS, BPETokenizer, Tokenizer, load_tokenizer
from minigpt_pl.runtime.atomic_io import TEMP_SUFFIX, atomic_write
from minigpt_pl.runtime.errors import UserError, rank_zero_print

SPLITS = ("train", "val", "test")
MAX_MERGE_CHARACTERS = 8_000_000
"""Of the train part that byte pairs are learned from, at most: a hundred bytes of memory for each."""
HEADER_BYTES = len(SPLITS) * np.dtype(np.int64).itemsize
"""Bytes at the start of a file of tokens: the number of tokens in each part."""


class MemmapTokens:
    """Token ids in a file. Each process maps it for itself: pickling a np.memmap would copy all of it.

    Args:
        path: The file.
        dtype: Of a token id.
        offset: Where in the file they begin, in bytes.
        length: How many they are.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], offset: int, length: int):
        self._place = path, dtype, offset, length
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ids = np.frombuffer(self._map, dtype, length, offset)

    def __reduce__(self) -> tuple[Any, ...]:
        return MemmapTokens, self._place

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, places: NDArray[np.int64]) -> NDArray[Any]:
        found = self.ids[places]
        if self.ids.nbytes > LARGE_FILE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # else all of a large file becomes resident, window by window
        return found


TokenArray = NDArray[Any] | MemmapTokens


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/minigpt`, else `~/.cache/minigpt`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minigpt")


def train_bpe(
    path: Path, info: TextStats, train_end: int, vocab_size: int, min_pair_freq: int, cache: Path
) -> BPETokenizer:
    """The byte pairs of a text's train part, from the cache if they are there.

    Args:
        path: The text file.
        info: What it holds.
        train_end: Where the train part ends, in characters.
        vocab_size: As for `BPETokenizer.train`.
        min_pair_freq: As for `BPETokenizer.train`.
        cache: Where tokenizers are kept, if it can be written.
    """
    end = min(train_end, MAX_MERGE_CHARACTERS)
    settings = f"{info.sha256}/{end}/{vocab_size}/{min_pair_freq}/{MAX_LINE_CHARACTERS}/{version('tokenizers')}"
    kept = cache / f"merges-{hashlib.sha256(settings.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        tokenizer = load_tokenizer(**json.loads(kept.read_text("utf-8")))
        assert isinstance(tokenizer, BPETokenizer)
        return tokenizer
    if end < train_end:
        rank_zero_print(f"learning byte pairs from the first {end:,} of the train part's {train_end:,} characters")
    train = takewhile(lambda piece: piece[0] == 0, iter_split_chunks(path, [end, info.characters], ""))
    tokenizer = BPETokenizer.train(info.alphabet, (piece for _, piece in train), vocab_size, min_pair_freq)
    with suppress(OSError):
        atomic_write(kept, json.dumps({"dumped": tokenizer.dump(), "sha256": tokenizer.sha256}).encode())
    return tokenizer


def tokenize(path: Path, info: TextStats, tokenizer: Tokenizer, ends: list[int], cache: Path) -> dict[str, TokenArray]:
    """The token ids of each part, from the cache if they are there.

    Args:
        path: The text file.
        info: What it holds.
        tokenizer: What a token is.
        ends: Where the parts end, in characters.
        cache: Where token ids are kept, if it can be written.

    Raises:
        InputError: If the text is no longer what `info` says.
    """
    name = f"tokens-{info.sha256[:24]}-{tokenizer.sha256[:24]}-{'-'.join(map(str, ends))}"
    kept = cache / f"{name}.bin"
    try:
        if tokens := load_splits(kept, tokenizer.dtype):
            return tokens
        cache.mkdir(parents=True, exist_ok=True)
        lock = cache / f"{name}.lock"
        with FileLock(lock):  # of several processes, one works and the others wait for it
            if tokens := load_splits(kept, tokenizer.dtype):
                return tokens
            temporary = cache / f"{name}{TEMP_SUFFIX}"  # of one name: who died over it left no more than one
            try:
                with temporary.open("wb") as file:
                    write_splits(file, path, info, tokenizer, ends)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, kept)
            finally:
                temporary.unlink(missing_ok=True)
                with suppress(OSError):
                    lock.unlink()  # who waits for it still finds the tokens
        tokens = load_splits(kept, tokenizer.dtype)
        assert tokens is not None, f"{kept} is not what was written"
        return tokens
    except OSError as error:
        rank_zero_print(f"the token cache {cache} cannot be written ({error.strerror}): tokens stay in memory")
    buffer = io.BytesIO()
    lengths = write_splits(buffer, path, info, tokenizer, ends)
    everything = np.frombuffer(buffer.getbuffer(), tokenizer.dtype, offset=HEADER_BYTES)
    return dict(zip(SPLITS, np.split(everything, np.cumsum(lengths)[:-1]), strict=True))


def load_splits(path: Path, dtype: np.dtype[Any]) -> dict[str, TokenArray] | None:
    """The parts in a file that `write_parts` has written; None if it is missing or damaged."""
    try:
        with path.open("rb") as file:
            lengths = np.frombuffer(file.read(HEADER_BYTES), np.int64).tolist()
            size = file.seek(0, io.SEEK_END)
    except (OSError, ValueError):
        return None
    offsets = [HEADER_BYTES + dtype.itemsize * sum(lengths[:part]) for part in range(len(lengths) + 1)]
    if len(lengths) != len(SPLITS) or min(lengths) < 0 or offsets[-1] != size:
        return None
    return {name: MemmapTokens(path, dtype, *place) for name, *place in zip(SPLITS, offsets[:-1], lengths, strict=True)}


def write_splits(file: BinaryIO, path: Path, info: TextStats, tokenizer: Tokenizer, ends: list[int]) -> list[int]:
    """Tokenizes each part of a text by itself; returns the number of tokens in each."""
    digest, lengths = hashlib.sha256(), [0] * len(SPLITS)

    def hashed(pieces: Iterable[tuple[int, str]]) -> Iterator[str]:
        for _, piece in pieces:
            digest.update(piece.encode())
            yield piece

    file.write(bytes(HEADER_BYTES))
    for part, pieces in groupby(iter_split_chunks(path, ends, "tokenizing"), lambda piece: piece[0]):
        for ids in tokenizer.encode_chunks(hashed(pieces)):
            lengths[part] += len(ids)
            file.write(ids.tobytes())
    if digest.hexdigest() != info.sha256:
        raise UserError(f"data.path {path} changed while it was read: start again when it is complete")
    file.seek(0)
    file.write(np.array(lengths, np.int64).tobytes())
    return lengths
