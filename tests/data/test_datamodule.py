"""From a text file to tokens: splits, texts that are too short, and the token cache.

Batches are tested in test_datasets, what an evaluation counts in training/test_counting.
"""

import hashlib
import mmap
import multiprocessing
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from minigpt_pl.data import corpus, token_cache
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.sources import Segment
from minigpt_pl.data.token_cache import SPLITS, MemmapTokens
from minigpt_pl.runtime.errors import UserError

TEXT = "".join(f"line {i}: the sea comes in, the sea goes öut.\r\n" for i in range(40))
LF = TEXT.replace("\r\n", "\n")
KINDS = ("char", "bpe")


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minigpt"


def module(path: Path, **changes: Any) -> TextDataModule:
    config = {"block_size": 8, "batch_size": 4, "eval_every": 10, "seed": 1, "bpe_vocab_size": 60}
    return TextDataModule(path=str(path), **{**config, **changes})


def split_texts(data: TextDataModule) -> list[str]:
    return [data.tokenizer.decode(data.tokens(split).tolist()) for split in SPLITS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "data.batch_size 0: it must be a whole number above 0"),
        ({"num_workers": -1}, "data.num_workers -1: it must be a whole number of at least 0"),
        ({"token_noise": 1.0}, "data.token_noise 1.0: it must be a number of at least 0 and below 1"),
        ({"train_frac": 1.0}, "data.train_frac 1.0: it must be a number above 0 and below 1"),
        ({"test_frac": 0.1}, "data.train_frac 0.9: with data.test_frac 0.1, nothing is left to validate on"),
    ],
)
def test_an_option_out_of_its_range_is_refused(text_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        module(text_path, **changes)
    assert str(refusal.value).startswith(message)


# Splits.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("train_frac", "test_frac"), [(0.9, 0.0), (0.5, 0.25), (0.613, 0.1), (0.8, 0.1)])
def test_both_tokenizers_split_the_same_characters(
    text_path: Path, kind: str, train_frac: float, test_frac: float
) -> None:
    data = module(text_path, tokenizer=kind, train_frac=train_frac, test_frac=test_frac)
    a, b = int(train_frac * len(LF)), int((1 - test_frac) * len(LF))
    assert split_texts(data) == [LF[:a], LF[a:b], LF[b:]]


def test_merges_are_learned_from_the_training_split_alone(text_path: Path) -> None:
    first = module(text_path, tokenizer="bpe").tokenizer.dump()
    cut = int(0.9 * len(LF))
    text_path.write_text(LF[:cut] + "".join(reversed(LF[cut:])), "utf-8")
    assert module(text_path, tokenizer="bpe").tokenizer.dump() == first, "the validation split decided a merge"
    text_path.write_text("".join(reversed(LF[:cut])) + LF[cut:], "utf-8")
    assert module(text_path, tokenizer="bpe").tokenizer.dump() != first


def test_merges_are_learned_from_the_whole_text_where_asked(text_path: Path) -> None:
    cut = int(0.9 * len(LF))
    text_path.write_text(LF[:cut] + "seagull " * 12, "utf-8")
    for source in ("train", "all"):
        data = module(text_path, tokenizer="bpe", bpe_vocab_size=100, bpe_train_on=source)
        assert any("gull" in token for token in data.tokenizer.vocabulary) == (source == "all")


@pytest.mark.parametrize("across_lines", [False, True])
@pytest.mark.parametrize(("train_frac", "test_frac"), [(0.9, 0.0), (0.613, 0.1)])
def test_a_text_can_be_split_by_tokens(
    text_path: Path, train_frac: float, test_frac: float, across_lines: bool
) -> None:
    fractions = {"train_frac": train_frac, "test_frac": test_frac}
    options = {**fractions, "tokenizer": "bpe", "bpe_across_lines": across_lines}
    data = module(text_path, **options, split_unit="tokens")
    ids = data.tokenizer.encode(LF)
    a, b = int(train_frac * len(ids)), int((1 - test_frac) * len(ids))
    assert [data.tokens(split).tolist() for split in SPLITS] == [part.tolist() for part in np.split(ids, [a, b])]
    assert "".join(split_texts(data)) == LF
    assert split_texts(data) != split_texts(module(text_path, **options)), "it validates on the same text"
    by_characters = split_texts(module(text_path, **fractions))
    assert split_texts(module(text_path, **fractions, split_unit="tokens")) == by_characters


def test_a_text_is_split_by_tokens_in_memory_too(text_path: Path, tmp_path: Path) -> None:
    options = {"tokenizer": "bpe", "split_unit": "tokens", "test_frac": 0.05}
    expected = split_texts(module(text_path, **options))
    (tmp_path / "file").write_text("not a directory", "utf-8")
    with patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path / "file")):
        assert split_texts(module(text_path, **options)) == expected


def test_a_text_that_is_too_long_for_merges_across_lines_is_refused(text_path: Path) -> None:
    options = {"tokenizer": "bpe", "bpe_across_lines": True}
    with patch.object(token_cache, "MAX_SEQUENCE_CHARACTERS", len(LF)):
        module(text_path, **options).read()
    with (
        patch.object(token_cache, "MAX_SEQUENCE_CHARACTERS", len(LF) - 1),
        pytest.raises(UserError, match=f"bpe_across_lines true: the text has {len(LF):,} characters, and"),
    ):
        module(text_path, **options).read()


def test_merges_are_learned_from_the_beginning_of_a_large_training_split(
    text_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with patch.object(token_cache, "MAX_MERGE_CHARACTERS", 300):
        first = module(text_path, tokenizer="bpe").tokenizer.dump()
        assert "byte pairs are learned from the first 300 of 1" in capfd.readouterr().err
        text_path.write_text(LF[:300] + "".join(reversed(LF[300:])), "utf-8")
        assert module(text_path, tokenizer="bpe").tokenizer.dump() == first


def test_a_character_of_the_validation_split_alone_is_in_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(LF + "Z" * 4, "utf-8")
    for kind in KINDS:
        assert "Z" in module(path, tokenizer=kind).tokenizer.vocabulary
    assert "ZZ" not in module(path, tokenizer="bpe").tokenizer.vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_reading_in_chunks_of_any_size_gives_the_same_tokens(text_path: Path, cache: Path, kind: str) -> None:
    text_path.write_bytes(text_path.read_bytes() + b"one line " * 300)  # longer than a line may be for byte pairs
    results = []
    for size in (1, 2, 7, 1000, 1 << 20):
        with patch.object(corpus, "CHUNK_BYTES", size):
            data = module(text_path, tokenizer=kind, test_frac=0.05)
            results.append((data.text_stats, data.tokenizer.sha256, [data.tokens(split).tolist() for split in SPLITS]))
        for entry in cache.iterdir():
            entry.unlink()
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block_size": 32},
            "its train split has 9 tokens and needs 33; use .* a smaller model.block_size",
        ),
        ({"block_size": 4}, "its val split has 1 tokens and needs 2; use a longer text or a larger share for val"),
        ({"block_size": 4, "eval_mode": "sampled"}, "its val split has 1 tokens and needs 5"),
        ({"block_size": 4, "train_frac": 0.7, "test_frac": 0.1}, "its test split has 1 tokens and needs 2"),
    ],
)
def test_a_text_that_is_too_short_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("0123456789", "utf-8")
    with pytest.raises(UserError, match=f"it is too short: {message}"):
        module(path, **changes).read()


# The cache.


def cached(cache: Path) -> dict[str, Path]:
    return {path.name.split("-")[0]: path for path in cache.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_start_reads_the_cache_instead_of_the_text(text_path: Path, cache: Path, kind: str) -> None:
    first = module(text_path, tokenizer=kind)
    expected = split_texts(first)
    entry = cached(cache)["tokens"]
    content = bytearray(entry.read_bytes())
    content[-1] = 0
    entry.write_bytes(content)  # marks it
    entry.with_suffix(".lock").mkdir()  # a cache that is readable but not writable is used too
    with patch.object(corpus, "CHUNK_BYTES", 0):  # nothing can be read
        second = module(text_path, tokenizer=kind)
        assert second.tokens("val").tolist()[:-1] == first.tokens("val").tolist()[:-1]
        assert second.tokens("val")[-1] == 0
    assert split_texts(first)[0] == expected[0]
    assert isinstance(second.read().tokens["val"].ids, MemmapTokens)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"", lambda b: b[:10], lambda b: b"garbage." * 3 + b[24:]],
    ids=["truncated", "longer", "empty", "truncated header", "garbage"],
)
def test_damaged_tokens_are_noticed_and_encoded_again(
    text_path: Path, cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    expected = split_texts(module(text_path))
    path = cached(cache)["tokens"]
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    assert split_texts(module(text_path)) == expected
    assert path.read_bytes() == intact


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"definition": "{}", "sha256": "0"}', '{"definition": 1}'])
def test_damaged_merges_are_noticed_and_learned_again(text_path: Path, cache: Path, damage: str) -> None:
    expected = module(text_path, tokenizer="bpe").tokenizer.dump()
    path = cached(cache)["merges"]
    intact = path.read_bytes()
    path.write_text(damage, "utf-8")
    assert module(text_path, tokenizer="bpe").tokenizer.dump() == expected
    assert path.read_bytes() == intact


def test_cache_entries_are_found_by_everything_that_determines_them(text_path: Path, cache: Path) -> None:
    variants: list[dict[str, Any]] = [
        {}, {"train_frac": 0.8}, {"test_frac": 0.05}, {"tokenizer": "bpe"}, {"tokenizer": "bpe", "bpe_vocab_size": 50},
        {"tokenizer": "bpe", "bpe_min_pair_freq": 30}, {"tokenizer": "bpe", "bpe_across_lines": True},
        {"tokenizer": "bpe", "split_unit": "tokens"}, {"tokenizer": "bpe", "train_frac": 0.1},
        {"tokenizer": "bpe", "train_frac": 0.1, "bpe_train_on": "all"},
    ]  # fmt: skip
    fresh = []
    for changes in variants:
        with patch.dict(os.environ, XDG_CACHE_HOME=str(cache / str(len(fresh)))):
            fresh.append(split_texts(module(text_path, **changes)))
    shared = [split_texts(module(text_path, **changes)) for changes in variants]
    assert shared == fresh
    assert len([path for path in cache.iterdir() if path.name.startswith("tokens")]) == len(variants)


def test_cache_entries_of_earlier_versions_are_found(text_path: Path, cache: Path) -> None:
    """Merges are learned for minutes: a new option with its default value makes no other entry."""
    data = module(text_path, tokenizer="bpe")
    text, tokenizer, n = data.text_stats.sha256, data.tokenizer.sha256, len(LF)
    key = f"{text}/{int(0.9 * n)}/60/2/1024/{version('tokenizers')}"
    merges = f"merges-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    tokens = f"tokens-{text[:24]}-{tokenizer[:24]}-{int(0.9 * n)}-{n}-{n}.bin"
    assert {merges, tokens} < {path.name for path in cache.iterdir()}


def test_a_cache_that_is_not_writable_is_reported_once(
    text_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = {kind: split_texts(module(text_path, tokenizer=kind)) for kind in KINDS}
    (tmp_path / "file").write_text("not a directory", "utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for kind in KINDS:
        capfd.readouterr()
        assert split_texts(module(text_path, tokenizer=kind)) == expected[kind]
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"the token cache {tmp_path / 'file' / 'minigpt'} is not writable (Not a directory)")


def test_a_text_that_changes_while_it_is_read_is_refused(text_path: Path, cache: Path) -> None:
    """Otherwise the cache would hold the tokens of one text under the hash of another."""
    stats = corpus.read_stats([text_path], cache)
    text_path.write_bytes(text_path.read_bytes().replace(b"sea", b"see"))
    tokenizer = module(text_path).tokenizer
    with pytest.raises(UserError, match="changed while it was read"):
        token_cache.tokenize([Segment((text_path,), (100, 200, stats.characters))], stats, tokenizer, cache / "other")
    assert not any((cache / "other").iterdir()), "an incomplete file is left"


def tokens_in_process(path: str) -> list[str]:
    return split_texts(module(Path(path), tokenizer="bpe"))


def test_two_processes_at_once_agree(text_path: Path, cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        one, other = pool.map(tokens_in_process, [str(text_path)] * 2, chunksize=1)
        pool.close()  # not terminate(): workers inherit our handlers, which ignore SIGTERM in them
        pool.join()
    assert one == other == tokens_in_process(str(text_path))
    assert set(cached(cache)) == {"text", "merges", "tokens"}, "a temporary file is left"


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_tokens_of_a_large_text_do_not_stay_in_memory(tmp_path: Path) -> None:
    size = token_cache.LARGE_FILE_BYTES + 10_000_000
    with (tmp_path / "tokens.bin").open("wb") as file:
        file.write(np.array([size, 0, 0]).tobytes() + bytes(size))
    splits = token_cache.load_splits(tmp_path / "tokens.bin", np.dtype(np.uint8), 1)
    assert splits is not None
    before = resident()
    for start in range(0, size - 10**6, 10**6):
        splits["train"].ids[np.arange(start, start + 10**6, mmap.PAGESIZE)]
    assert resident() - before < size / 4
