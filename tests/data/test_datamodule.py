"""From a text file to batches: parts, the cache of tokens, and windows that depend on (seed, step, row) alone.

What a check counts is in test_counting, the reading of a file in test_text, tokens in test_tokenizer.
"""

import math
import mmap
import multiprocessing
import os
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt_pl.data import corpus as text_room
from minigpt_pl.data import token_cache as token_room
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.datasets import Batch, ResumableSampler, SamplingMode, TrainDataset, epoch_starts
from minigpt_pl.data.token_cache import SPLITS, MemmapTokens
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.seeding import uniform

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


def module(path: Path, **settings: Any) -> TextDataModule:
    plain = {"block_size": 8, "batch_size": 4, "eval_every": 10, "seed": 1, "bpe_vocab_size": 60}
    return TextDataModule(str(path), **{**plain, **settings})


def part_texts(data: TextDataModule) -> list[str]:
    return [data.tokenizer.decode(data.tokens(part).tolist()) for part in SPLITS]


# Parts.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("train_frac", "test_frac"), [(0.9, 0.0), (0.5, 0.25), (0.613, 0.1), (0.8, 0.1)])
def test_both_tokenizers_split_the_same_characters(
    text_path: Path, kind: str, train_frac: float, test_frac: float
) -> None:
    data = module(text_path, tokenizer=kind, train_frac=train_frac, test_frac=test_frac)
    a, b = int(train_frac * len(LF)), int((1 - test_frac) * len(LF))
    assert part_texts(data) == [LF[:a], LF[a:b], LF[b:]]


def test_merges_are_learned_from_the_train_part_alone(text_path: Path) -> None:
    first = module(text_path, tokenizer="bpe").tokenizer.dump()
    cut = int(0.9 * len(LF))
    text_path.write_text(LF[:cut] + "".join(reversed(LF[cut:])), "utf-8")
    assert module(text_path, tokenizer="bpe").tokenizer.dump() == first, "the val part decided a merge"
    text_path.write_text("".join(reversed(LF[:cut])) + LF[cut:], "utf-8")
    assert module(text_path, tokenizer="bpe").tokenizer.dump() != first


def test_merges_are_learned_from_the_beginning_of_a_large_train_part(
    text_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with patch.object(token_room, "MERGE_CHARACTERS", 300):
        first = module(text_path, tokenizer="bpe").tokenizer.dump()
        assert "byte pairs from the first 300 of the train part's" in capfd.readouterr().err
        text_path.write_text(LF[:300] + "".join(reversed(LF[300:])), "utf-8")
        assert module(text_path, tokenizer="bpe").tokenizer.dump() == first


def test_a_character_of_the_val_part_alone_is_in_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(LF + "Z" * 4, "utf-8")
    for kind in KINDS:
        assert "Z" in module(path, tokenizer=kind).tokenizer.vocabulary
    assert "ZZ" not in module(path, tokenizer="bpe").tokenizer.vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_reading_in_pieces_of_any_size_gives_the_same_tokens(text_path: Path, cache: Path, kind: str) -> None:
    text_path.write_bytes(text_path.read_bytes() + b"one line " * 300)  # longer than a line may be for byte pairs
    found = []
    for size in (1, 2, 7, 1000, 1 << 20):
        with patch.object(text_room, "CHUNK_BYTES", size):
            data = module(text_path, tokenizer=kind, test_frac=0.05)
            found.append((data.text_info, data.tokenizer.sha256, [data.tokens(part).tolist() for part in SPLITS]))
        for kept in cache.iterdir():
            kept.unlink()
    assert all(other == found[0] for other in found[1:])


def test_a_text_too_short_is_told_how_many_characters_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for settings, said in [
        ({}, "train part has 9 tokens and needs 33"),
        ({"block_size": 4}, "val part has 1 tokens and needs 2"),
    ]:
        path.write_text("0123456789", "utf-8")
        with pytest.raises(UserError, match=said) as refusal:
            module(path, **({"block_size": 32} | settings)).read()
        enough = int(str(refusal.value).split("about ")[1].split()[0])
        path.write_text("x" * enough, "utf-8")
        module(path, **({"block_size": 32} | settings)).read()


def test_sampled_checks_need_a_window_in_the_val_part(text_path: Path) -> None:
    module(text_path, block_size=250).read()
    with pytest.raises(UserError, match=r"val part has \d+ tokens and needs 251"):
        module(text_path, block_size=250, eval_mode="sampled").read()


# The cache.


def cached(cache: Path) -> dict[str, Path]:
    return {path.name.split("-")[0]: path for path in cache.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_start_reads_the_cache_and_not_the_text(text_path: Path, cache: Path, kind: str) -> None:
    first = module(text_path, tokenizer=kind)
    expected = part_texts(first)
    kept = cached(cache)
    content = bytearray(kept["tokens"].read_bytes())
    content[-1] = 0
    kept["tokens"].write_bytes(content)  # a trace by which to know it again
    kept["tokens"].with_suffix(".lock").mkdir()  # a cache that may be read but not written serves as well
    with patch.object(text_room, "CHUNK_BYTES", 0):  # nothing can be read
        second = module(text_path, tokenizer=kind)
        assert second.tokens("val").tolist()[:-1] == first.tokens("val").tolist()[:-1]
        assert second.tokens("val")[-1] == 0
    assert part_texts(first)[0] == expected[0]
    assert isinstance(second.read().tokens["val"], MemmapTokens)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"", lambda b: b[:10], lambda b: b"garbage." * 3 + b[24:]],
    ids=["cut off", "longer", "empty", "cut in the head", "garbage"],
)
def test_damaged_tokens_are_noticed_and_made_anew(
    text_path: Path, cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    expected = part_texts(module(text_path))
    path = cached(cache)["tokens"]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert part_texts(module(text_path)) == expected
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"dumped": "{}", "sha256": "0"}', '{"dumped": 1}'])
def test_damaged_merges_are_noticed_and_learned_anew(text_path: Path, cache: Path, damage: str) -> None:
    expected = module(text_path, tokenizer="bpe").tokenizer.dump()
    path = cached(cache)["merges"]
    whole = path.read_bytes()
    path.write_text(damage, "utf-8")
    assert module(text_path, tokenizer="bpe").tokenizer.dump() == expected
    assert path.read_bytes() == whole


def test_the_cache_is_found_by_what_it_was_made_from(text_path: Path, cache: Path) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"train_frac": 0.8}, {"test_frac": 0.05}, {"tokenizer": "bpe"}, {"tokenizer": "bpe", "bpe_vocab_size": 50},
        {"tokenizer": "bpe", "bpe_min_pair_freq": 30},
    ]  # fmt: skip
    fresh = []
    for setting in settings:
        with patch.dict(os.environ, XDG_CACHE_HOME=str(cache / str(len(fresh)))):
            fresh.append(part_texts(module(text_path, **setting)))
    shared = [part_texts(module(text_path, **setting)) for setting in settings]
    assert shared == fresh
    assert len([path for path in cache.iterdir() if path.name.startswith("tokens")]) == len(settings)


def test_a_cache_that_cannot_be_written_is_said_once(
    text_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = {kind: part_texts(module(text_path, tokenizer=kind)) for kind in KINDS}
    (tmp_path / "file").write_text("in the way", "utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for kind in KINDS:
        capfd.readouterr()
        assert part_texts(module(text_path, tokenizer=kind)) == expected[kind]
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"the token cache {tmp_path / 'file' / 'minigpt'} cannot be written (Not a directory)")


def test_a_text_that_changes_while_it_is_read_is_refused(text_path: Path, cache: Path) -> None:
    """Else the cache would keep, under the hash of one text, the tokens of another."""
    info = text_room.read_stats(text_path, cache)
    data = module(text_path)
    text_path.write_bytes(text_path.read_bytes().replace(b"sea", b"see"))
    tokenizer = module(text_path).tokenizer
    with pytest.raises(UserError, match="changed while it was read"):
        token_room.tokenize(text_path, info, tokenizer, [100, 200, info.characters], cache / "other")
    assert not any((cache / "other").iterdir()), "something half-made was kept"
    del data


def tokens_in_process(path: str) -> list[str]:
    return part_texts(module(Path(path), tokenizer="bpe"))


def test_two_processes_at_once_agree(text_path: Path, cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        one, other = pool.map(tokens_in_process, [str(text_path)] * 2, chunksize=1)
        pool.close()  # workers of a process that has our handlers do not hear the SIGTERM of a pool's end
        pool.join()
    assert one == other == tokens_in_process(str(text_path))
    assert set(cached(cache)) == {"text", "merges", "tokens"}, "something was left behind"


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells")
def test_tokens_of_a_large_text_do_not_stay_in_memory(tmp_path: Path) -> None:
    size = token_room.LARGE_FILE_BYTES + 10_000_000
    with (tmp_path / "tokens.bin").open("wb") as file:
        file.write(np.array([size, 0, 0]).tobytes() + bytes(size))
    parts = token_room.load_splits(tmp_path / "tokens.bin", np.dtype(np.uint8))
    assert parts is not None
    before = resident()
    for start in range(0, size - 10**6, 10**6):
        parts["train"][np.arange(start, start + 10**6, mmap.PAGESIZE)]
    assert resident() - before < size / 4


# Training batches.


IDS = np.arange(1000, dtype=np.uint16)  # a token is its place


ORDERS: list[SamplingMode] = ["random", "epoch"]


def batches(
    accumulate: int = 1,
    batch_size: int = 64,
    rank: int = 0,
    world: int = 1,
    ids: Any = IDS,
    order: SamplingMode = "random",
    noise: float = 0.0,
) -> TrainDataset:
    return TrainDataset(ids, 8, batch_size, accumulate, 1337, rank, world, order, noise, 4)


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_targets_are_the_inputs_shifted_by_one() -> None:
    x, y = batches()[5]
    assert x.shape == y.shape == (64, 8)
    assert torch.equal(y, x + 1), "consecutive tokens of the part"


@pytest.mark.parametrize("order", ORDERS)
def test_four_micro_batches_are_one_batch_four_times_as_large(order: SamplingMode) -> None:
    for step in (0, 3, 100_000):
        large = batches(sampling=order, token_noise=0.2)[step]
        small = [batches(accumulate=4, batch_size=16, sampling=order, token_noise=0.2)[4 * step + i] for i in range(4)]
        assert equal(large, Batch(*(torch.cat(parts) for parts in zip(*small, strict=True))))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world", [2, 4])
def test_the_processes_share_one_batch(world: int, order: SamplingMode) -> None:
    for i in (0, 7):
        shares = [batches(2, 64, rank, world, sampling=order, token_noise=0.2)[i] for rank in range(world)]
        assert equal(
            batches(2, sampling=order, token_noise=0.2)[i],
            Batch(*(torch.cat(parts) for parts in zip(*shares, strict=True))),
        )


@pytest.mark.parametrize("order", ORDERS)
def test_noise_replaces_its_share_of_the_inputs_and_no_target(order: SamplingMode) -> None:
    ids = np.repeat(IDS[:4], [100, 200, 300, 400])
    plain, noised = (
        [batches(ids=ids, sampling=order, token_noise=noise)[i] for i in range(60)] for noise in (0.0, 0.25)
    )
    assert all(torch.equal(one.targets, other.targets) for one, other in zip(plain, noised, strict=True))
    before, after = (torch.cat([batch.inputs for batch in some]) for some in (plain, noised))
    changed, count = before != after, before.numel()
    expected = 0.25 * 3 / 4  # one of its own kind may take the place of a token
    for token in range(4):
        of = (before == token).sum().item()
        share = changed[before == token].float().mean().item()
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / of), token
        share = ((after == token) & changed).sum().item() / ((before != token).sum().item())
        assert share == pytest.approx(0.25 / 4, rel=0.1), "each as likely"
    assert abs(changed.float().mean(0) - changed.float().mean()).max() < 5 * math.sqrt(0.25 / (count / 8)), "anywhere"
    assert not torch.equal(changed[:64], changed[64:128]), "each step has its own"
    assert torch.equal(noised[7].inputs, batches(ids=ids, sampling=order, token_noise=0.25)[7].inputs)


@pytest.mark.parametrize("order", ORDERS)
def test_each_step_and_seed_has_a_batch_of_its_own(order: SamplingMode) -> None:
    drawn = {tuple(batches(sampling=order)[i].inputs[:, 0].tolist()) for i in range(50)}
    drawn |= {tuple(TrainDataset(IDS, 8, 64, 1, seed, 0, 1, order)[0].inputs[:, 0].tolist()) for seed in range(50)}
    assert len(drawn) == 100


def test_in_an_epoch_no_token_is_a_target_twice_and_few_are_missed() -> None:
    rows = torch.cat(
        [batches(batch_size=41, sampling="epoch")[i].targets for i in range(6)]
    )  # 246 windows, 123 an epoch
    epochs = rows.view(2, -1)
    for targets in epochs:
        counts = torch.bincount(targets, minlength=1000)
        assert counts.max() == 1
        assert counts.sum() == 123 * 8
        assert counts[16:-16].min() == 1, "only at the ends"
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0].sort().values, epochs[1].sort().values), "the next one begins elsewhere"
    steps = (rows[1:, 0] - rows[:-1, 0]).abs()
    assert (steps == 8).float().mean() < 0.1, "neighbours do not follow each other"


def test_an_epoch_is_a_fixed_function_of_its_seed_and_number() -> None:
    """Runs on record depend on it."""
    assert epoch_starts(60, 8, 1337, 0).tolist() == [40, 8, 0, 16, 24, 32]


@pytest.mark.parametrize("length", [9, 10, 16, 17, 24, 25, 33])
def test_epochs_of_a_short_text_lie_within_it(length: int) -> None:
    few = batches(ids=np.arange(length, dtype=np.uint8), sampling="epoch")
    targets = torch.cat([few[i].targets for i in range(20)])
    assert targets.max() <= length - 1
    assert (targets[:, 0] >= 1).all()
    assert length < 18 or len(targets[:, 0].unique()) > 1


def test_every_start_is_drawn_about_equally_often_the_last_one_too() -> None:
    """Twelve windows fit; none reaches beyond the end."""
    few = batches(ids=np.arange(20, dtype=np.uint8))
    starts = torch.cat([few[i].inputs[:, 0] for i in range(300)])
    counts = torch.bincount(starts, minlength=12)
    assert len(counts) == 12
    assert (counts - 1600).abs().max() < 5 * 1600**0.5


@given(st.integers(1, 2**40))
def test_the_largest_fraction_is_a_place_inside(room: int) -> None:
    assert int((1 - 2.0**-53) * room) == room - 1


def test_starts_are_fractions_of_the_part() -> None:
    """So another text, or another length of the same one, is sampled at the same places."""
    short = batches(ids=IDS)[3].inputs[:, 0] / (1000 - 8)
    long = batches(ids=np.arange(60_000, dtype=np.uint16))[3].inputs[:, 0] / (60_000 - 8)
    assert (short - long).abs().max() < 1 / (1000 - 8)


def test_fractions_are_a_fixed_function_of_their_purpose() -> None:
    """Runs on record depend on it."""
    assert uniform(2, 1337, "batch", 0).tolist() == uniform(5, 1337, "batch", 0).tolist()[:2]
    assert [round(x, 12) for x in uniform(2, 1337, "batch", 0).tolist()] == [0.628268319219, 0.363120934399]


def loaded(path: Path, workers: int) -> list[Batch]:
    data = module(path, num_workers=workers)
    data.trainer = SimpleNamespace(global_step=2, accumulate_grad_batches=2, max_steps=4, world_size=1, global_rank=0)  # type: ignore[assignment]
    return list(data.train_dataloader())


def test_workers_make_the_same_batches_and_a_resumed_run_goes_on(text_path: Path) -> None:
    alone = loaded(text_path, 0)
    expected = TrainDataset(module(text_path).tokens("train"), 8, 4, 2, 1, 0, 1)
    assert len(alone) == 4
    assert all(equal(batch, expected[i]) for i, batch in zip(ResumableSampler(4, 8), alone, strict=True))
    assert all(equal(one, other) for one, other in zip(alone, loaded(text_path, 2), strict=True))


def test_a_worker_maps_the_tokens_and_is_not_sent_a_copy(text_path: Path) -> None:
    text_path.write_text(LF * 50, "utf-8")
    data = module(text_path)
    here = TrainDataset(data.read().tokens["train"], 8, 64, 1, 1, 0, 1)
    sent = pickle.dumps(here)
    assert len(sent) < 2000 < data.tokens("train").nbytes
    there = pickle.loads(sent)
    assert all(equal(here[i], there[i]) for i in range(3))


def test_making_loaders_leaves_the_global_random_numbers_alone(text_path: Path) -> None:
    before = torch.get_rng_state()
    for workers, _ in product((0, 1), range(2)):
        loaded(text_path, workers)
    assert torch.equal(torch.get_rng_state(), before)
