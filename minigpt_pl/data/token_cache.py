"""Token ids of a text's splits: encoded in chunks, cached in a file that later runs map into memory.

What a token is is in `tokenizer`, where splits end in `datamodule`.
"""

import hashlib
import io
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from minigpt_pl.data.corpus import LARGE_FILE_BYTES, TextStats, iter_split_chunks, text_error
from minigpt_pl.data.tokenizer import MAX_LINE_CHARACTERS, BPETokenizer, Tokenizer, load_tokenizer
from minigpt_pl.runtime.atomic_io import TEMP_SUFFIX, atomic_write
from minigpt_pl.runtime.errors import UserError, rank_zero_print
from minigpt_pl.runtime.paths import NOWHERE

SPLITS = ("train", "val", "test")
MAX_MERGE_CHARACTERS = 8_000_000  # that merges are learned from: each takes a hundred bytes of memory
MAX_SEQUENCE_CHARACTERS = 350_000  # of bpe across lines: learning takes about a minute, and grows with the square
HEADER_BYTES = len(SPLITS) * np.dtype(np.int64).itemsize  # of a cache file: the number of tokens in each split


class MemmapTokens:
    """`length` token ids, from byte `offset` of a file. Each process maps the file: pickling an np.memmap copies it."""

    def __init__(self, path: Path, dtype: np.dtype[Any], offset: int, length: int):
        self._args = path, dtype, offset, length
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ids = np.frombuffer(self._map, dtype, length, offset)

    def __reduce__(self) -> tuple[Any, ...]:
        return MemmapTokens, self._args

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> "MemmapTokens":
        path, dtype, offset, _ = self._args
        return MemmapTokens(path, dtype, offset + start * dtype.itemsize, stop - start)

    def __getitem__(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        ids = self.ids[indices]
        if self.ids.nbytes > LARGE_FILE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # else a large file would become resident, window by window
        return ids


TokenArray = NDArray[Any] | MemmapTokens


def train_bpe(
    path: Path, stats: TextStats, train_end: int, vocab_size: int, min_pair_freq: int, across_lines: bool, cache: Path
) -> BPETokenizer:
    """The bpe tokenizer of a text's first `train_end` characters, from the cache if it is there.

    Raises:
        UserError: If the text is too long for merges across lines, or its characters alone are above vocab_size.
    """
    if across_lines and stats.characters > MAX_SEQUENCE_CHARACTERS:
        problem = f"the text has {stats.characters:,} characters, and this works for {MAX_SEQUENCE_CHARACTERS:,}"
        remedy = "use a shorter text, or merge within lines"
        raise UserError(problem, option="data.bpe_across_lines", value="true", remedy=remedy)
    end, max_line = min(train_end, MAX_MERGE_CHARACTERS), None if across_lines else MAX_LINE_CHARACTERS
    key = f"{stats.sha256}/{end}/{vocab_size}/{min_pair_freq}/{max_line}/{version('tokenizers')}"
    entry = cache / f"merges-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged
        cached = load_tokenizer(**json.loads(entry.read_text("utf-8")))
        assert isinstance(cached, BPETokenizer)
        return cached
    if end < train_end:
        rank_zero_print(f"byte pairs are learned from the first {end:,} of {train_end:,} training characters")
    chunks = takewhile(lambda chunk: chunk[0] == 0, iter_split_chunks(path, [end, stats.characters], ""))
    tokenizer = BPETokenizer.train(stats.alphabet, (text for _, text in chunks), vocab_size, min_pair_freq, max_line)
    with suppress(OSError):
        atomic_write(entry, json.dumps({"definition": tokenizer.dump(), "sha256": tokenizer.sha256}).encode())
    return tokenizer


def tokenize(path: Path, stats: TextStats, tokenizer: Tokenizer, ends: list[int], cache: Path) -> dict[str, TokenArray]:
    """The token ids of each split, from the cache if they are there. Split i ends at character `ends[i]`.

    Raises:
        UserError: If the text has changed since `stats` was made.
    """
    name = f"tokens-{stats.sha256[:24]}-{tokenizer.sha256[:24]}-{'-'.join(map(str, ends))}"
    entry, temporary, lock = (cache / f"{name}{suffix}" for suffix in (".bin", TEMP_SUFFIX, ".lock"))
    try:
        if tokens := load_splits(entry, tokenizer.dtype):
            return tokens
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # one process encodes, others wait and then find the tokens
            try:
                if not (tokens := load_splits(entry, tokenizer.dtype)):
                    with temporary.open("wb") as file:
                        encode_splits(file, path, stats, tokenizer, ends)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(temporary, entry)
                    tokens = load_splits(entry, tokenizer.dtype)
            finally:
                temporary.unlink(missing_ok=True)
                with suppress(OSError):
                    lock.unlink()
        assert tokens is not None, f"{entry} is not what was written"
        return tokens
    except OSError as error:
        cause = "there is no home directory for a token cache"
        cause = cause if cache == NOWHERE else f"the token cache {cache} is not writable ({error.strerror})"
        rank_zero_print(f"{cause}: tokens stay in memory")
    buffer = io.BytesIO()
    lengths = encode_splits(buffer, path, stats, tokenizer, ends)
    ids = np.frombuffer(buffer.getbuffer(), tokenizer.dtype, offset=HEADER_BYTES)
    return dict(zip(SPLITS, np.split(ids, np.cumsum(lengths)[:-1]), strict=True))


def tokenize_first(
    path: Path, stats: TextStats, tokenizer: Tokenizer, shares: tuple[float, ...], cache: Path
) -> dict[str, TokenArray]:
    """The token ids of each split, cut from those of the whole text. Split i ends at share `shares[i]` of the tokens.

    Raises:
        UserError: As `tokenize`.
    """
    ids = tokenize(path, stats, tokenizer, [stats.characters] * len(SPLITS), cache)["train"]
    spans = pairwise([0, *split_ends(shares, len(ids))])
    parts = (ids.part(a, b) if isinstance(ids, MemmapTokens) else ids[a:b] for a, b in spans)
    return dict(zip(SPLITS, parts, strict=True))


def split_ends(shares: tuple[float, ...], length: int) -> list[int]:
    """Where each split ends, in a text of `length` characters or tokens; the last one ends with the text."""
    return [*(int(share * length) for share in shares), length]


def load_splits(entry: Path, dtype: np.dtype[Any]) -> dict[str, TokenArray] | None:
    """The splits in a file that `encode_splits` wrote; None if it is missing or damaged."""
    try:
        with entry.open("rb") as file:
            lengths = np.frombuffer(file.read(HEADER_BYTES), np.int64).tolist()
            size = file.seek(0, io.SEEK_END)
    except (OSError, ValueError):
        return None
    offsets = [HEADER_BYTES + dtype.itemsize * sum(lengths[:i]) for i in range(len(lengths) + 1)]
    if len(lengths) != len(SPLITS) or min(lengths) < 0 or offsets[-1] != size:
        return None
    return {name: MemmapTokens(entry, dtype, *span) for name, *span in zip(SPLITS, offsets, lengths, strict=False)}


def encode_splits(file: BinaryIO, path: Path, stats: TextStats, tokenizer: Tokenizer, ends: list[int]) -> list[int]:
    """Writes the token ids of each split, encoded by itself; returns the number of tokens in each."""
    digest, lengths = hashlib.sha256(), [0] * len(SPLITS)

    def hashed(chunks: Iterable[tuple[int, str]]) -> Iterator[str]:
        for _, text in chunks:
            digest.update(text.encode())
            yield text

    file.write(bytes(HEADER_BYTES))
    for split, chunks in groupby(iter_split_chunks(path, ends, "tokenizing"), lambda chunk: chunk[0]):
        for ids in tokenizer.encode_chunks(hashed(chunks)):
            lengths[split] += len(ids)
            file.write(ids.tobytes())
    if digest.hexdigest() != stats.sha256:
        raise text_error(path, "the file changed while it was read", "start again when it is complete")
    file.seek(0)
    file.write(np.array(lengths, np.int64).tobytes())
    return lengths
