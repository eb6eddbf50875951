"""Token ids of a text's splits: encoded in chunks, cached in a file that later runs map into memory.

What a token is is in `tokenizer`, where splits end in `datamodule`.
"""

import hashlib
import io
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from minigpt_pl.data.corpus import LARGE_FILE_BYTES, TextStats, iter_split_chunks, text_error
from minigpt_pl.data.sources import Segment, split_ends
from minigpt_pl.data.tokenizer import MAX_LINE_CHARACTERS, BPETokenizer, Tokenizer, load_tokenizer
from minigpt_pl.runtime.atomic_io import TEMP_SUFFIX, atomic_write
from minigpt_pl.runtime.errors import UserError, rank_zero_print
from minigpt_pl.runtime.paths import NOWHERE

SPLITS = ("train", "val", "test")
MAX_MERGE_CHARACTERS = 8_000_000  # that merges are learned from: each takes a hundred bytes of memory
MAX_SEQUENCE_CHARACTERS = 350_000  # of bpe across lines: learning takes about a minute, and grows with the square
LENGTH = np.dtype(np.int64)  # a cache file begins with the number of tokens of each split in each segment
SPOOLED_BYTES = 50_000_000  # of a split's tokens that wait in memory until all are encoded


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


class SplitTokens(NamedTuple):
    """The token ids of a split, and how many of them each segment has."""

    ids: TokenArray
    lengths: tuple[int, ...]


def train_bpe(
    segments: Sequence[Segment], stats: TextStats, vocab_size: int, min_pair_freq: int, across_lines: bool, cache: Path
) -> BPETokenizer:
    """The bpe tokenizer of the first split of each segment, from the cache if it is there.

    Raises:
        UserError: If the text is too long for merges across lines, or its characters alone are above vocab_size.
    """
    if across_lines and stats.characters > MAX_SEQUENCE_CHARACTERS:
        problem = f"the text has {stats.characters:,} characters, and this works for {MAX_SEQUENCE_CHARACTERS:,}"
        remedy = "use a shorter text, or merge within lines"
        raise UserError(problem, option="data.bpe_across_lines", value="true", remedy=remedy)
    max_line, total = None if across_lines else MAX_LINE_CHARACTERS, sum(segment.ends[0] for segment in segments)
    learned, ends = min(total, MAX_MERGE_CHARACTERS), _ends_key(segments) if len(segments) > 1 else ""
    key = f"{stats.sha256}/{learned}{ends}/{vocab_size}/{min_pair_freq}/{max_line}/{version('tokenizers')}"
    entry = cache / f"merges-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged
        cached = load_tokenizer(**json.loads(entry.read_text("utf-8")))
        assert isinstance(cached, BPETokenizer)
        return cached
    if learned < total:
        rank_zero_print(f"byte pairs are learned from the first {learned:,} of {total:,} training characters")
    chunks = first_chunks(segments, learned)
    tokenizer = BPETokenizer.train(stats.alphabet, chunks, vocab_size, min_pair_freq, max_line)
    with suppress(OSError):
        atomic_write(entry, json.dumps({"definition": tokenizer.dump(), "sha256": tokenizer.sha256}).encode())
    return tokenizer


def first_chunks(segments: Sequence[Segment], characters: int) -> Iterator[str]:
    """The text of the first split of each segment, `characters` of it at most."""
    for files, ends in segments:
        used = min(ends[0], characters)
        characters -= used
        chunks = takewhile(lambda chunk: chunk[0] == 0, iter_split_chunks(files, [used, ends[-1]], ""))
        yield from (text for _, text in chunks if used)


def _ends_key(segments: Sequence[Segment]) -> str:
    return hashlib.sha256(repr([segment.ends for segment in segments]).encode()).hexdigest()[:24]


def tokenize(
    segments: Sequence[Segment], stats: TextStats, tokenizer: Tokenizer, cache: Path
) -> dict[str, SplitTokens]:
    """The token ids of each split, from the cache if they are there; each segment's part is encoded by itself.

    Raises:
        UserError: If the text has changed since `stats` was made.
    """
    ends = "-".join(map(str, segments[0].ends)) if len(segments) == 1 else _ends_key(segments)
    name, count = f"tokens-{stats.sha256[:24]}-{tokenizer.sha256[:24]}-{ends}", len(segments)
    entry, temporary, lock = (cache / f"{name}{suffix}" for suffix in (".bin", TEMP_SUFFIX, ".lock"))
    try:
        if tokens := load_splits(entry, tokenizer.dtype, count):
            return tokens
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # one process encodes, others wait and then find the tokens
            try:
                if not (tokens := load_splits(entry, tokenizer.dtype, count)):
                    with temporary.open("wb") as file:
                        encode_splits(file, segments, stats, tokenizer)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(temporary, entry)
                    tokens = load_splits(entry, tokenizer.dtype, count)
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
    lengths = encode_splits(buffer, segments, stats, tokenizer)
    ids = np.frombuffer(buffer.getbuffer(), tokenizer.dtype, offset=LENGTH.itemsize * lengths.size)
    parts = np.split(ids, lengths.sum(1).cumsum()[:-1])
    return {name: SplitTokens(part, tuple(n)) for name, part, n in zip(SPLITS, parts, lengths.tolist(), strict=True)}


def tokenize_first(
    files: tuple[Path, ...], stats: TextStats, tokenizer: Tokenizer, shares: tuple[float, ...], cache: Path
) -> dict[str, SplitTokens]:
    """The token ids of each split, cut from those of the whole text. Split i ends at share `shares[i]` of the tokens.

    Raises:
        UserError: As `tokenize`.
    """
    whole = Segment(files, (stats.characters,) * len(SPLITS))
    ids = tokenize([whole], stats, tokenizer, cache)["train"].ids
    spans = pairwise([0, *split_ends(shares, len(ids))])
    parts = (ids.part(a, b) if isinstance(ids, MemmapTokens) else ids[a:b] for a, b in spans)
    return {name: SplitTokens(part, (len(part),)) for name, part in zip(SPLITS, parts, strict=True)}


def load_splits(entry: Path, dtype: np.dtype[Any], segments: int) -> dict[str, SplitTokens] | None:
    """The splits in a file that `encode_splits` wrote; None if it is missing or damaged."""
    header = LENGTH.itemsize * len(SPLITS) * segments
    try:
        with entry.open("rb") as file:
            lengths = np.frombuffer(file.read(header), LENGTH).reshape(len(SPLITS), segments)
            size = file.seek(0, io.SEEK_END)
    except (OSError, ValueError):
        return None
    if lengths.min() < 0 or header + dtype.itemsize * int(lengths.sum()) != size:
        return None
    counts = lengths.sum(1).tolist()
    offsets = [header + dtype.itemsize * sum(counts[:i]) for i in range(len(SPLITS))]
    maps = (MemmapTokens(entry, dtype, *span) for span in zip(offsets, counts, strict=True))
    return {name: SplitTokens(ids, tuple(n)) for name, ids, n in zip(SPLITS, maps, lengths.tolist(), strict=True)}


def encode_splits(
    file: BinaryIO, segments: Sequence[Segment], stats: TextStats, tokenizer: Tokenizer
) -> NDArray[np.int64]:
    """Writes the token ids of each split, one after the other; returns their numbers, (splits, segments)."""
    digest, lengths = hashlib.sha256(), np.zeros((len(SPLITS), len(segments)), LENGTH)

    def hashed(chunks: Iterable[tuple[int, str]]) -> Iterator[str]:
        for _, text in chunks:
            digest.update(text.encode())
            yield text

    file.write(bytes(lengths.nbytes))
    with ExitStack() as stack:
        parts: list[Any] = [file] * len(SPLITS)  # the splits of one segment follow one another already
        if len(segments) > 1:
            parts = [stack.enter_context(SpooledTemporaryFile(SPOOLED_BYTES)) for _ in SPLITS]
        for number, (files, ends) in enumerate(segments):
            if number:
                digest.update(b"\n")
            for split, chunks in groupby(iter_split_chunks(files, ends, "tokenizing"), lambda chunk: chunk[0]):
                for ids in tokenizer.encode_chunks(hashed(chunks)):
                    lengths[split, number] += len(ids)
                    parts[split].write(ids.tobytes())
        if digest.hexdigest() != stats.sha256:
            remedy = "start again when it is complete"
            raise text_error(segments[0].files[0], "the file changed while it was read", remedy)
        for part in parts if len(segments) > 1 else []:
            part.seek(0)
            shutil.copyfileobj(part, file)
    file.seek(0)
    file.write(lengths.tobytes())
    return lengths
