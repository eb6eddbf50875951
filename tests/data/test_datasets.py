"""Training batches are pure functions of (seed, optimizer step, row), for any micro-batches, processes and workers."""

import math
import pickle
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minigpt_pl.data.config import SamplingMode
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.datasets import Batch, TrainDataset, epoch_starts
from minigpt_pl.runtime.seeding import uniform

TEXT = "".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(40))


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    return tmp_path / "text.txt"


def text_module(path: Path, **changes: Any) -> TextDataModule:
    return TextDataModule(path=str(path), block_size=8, batch_size=4, eval_every=10, seed=1, **changes)


IDS = np.arange(1000, dtype=np.uint16)  # each token is its position
MODES: list[SamplingMode] = ["random", "epoch"]


def dataset(ids: Any = IDS, batch_size: int = 64, seed: int = 1337, **options: Any) -> TrainDataset:
    return TrainDataset(ids, 8, batch_size, seed, vocab_size=4, **options)


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_targets_are_the_inputs_shifted_by_one() -> None:
    x, y = dataset()[5]
    assert x.shape == y.shape == (64, 8)
    assert torch.equal(y, x + 1), "consecutive tokens of the split"


@pytest.mark.parametrize("mode", MODES)
def test_four_micro_batches_are_one_batch_four_times_as_large(mode: SamplingMode) -> None:
    large = dataset(sampling=mode, token_noise=0.2)
    small = dataset(batch_size=16, accumulate=4, sampling=mode, token_noise=0.2)
    for step in (0, 3, 100_000):
        assert equal(large[step], joined([small[4 * step + i] for i in range(4)]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [2, 4])
def test_the_processes_share_one_batch(world: int, mode: SamplingMode) -> None:
    options: dict[str, Any] = {"accumulate": 2, "sampling": mode, "token_noise": 0.2}
    for i in (0, 7):
        shares = [dataset(rank=rank, world=world, **options)[i] for rank in range(world)]
        assert equal(dataset(**options)[i], joined(shares))


@pytest.mark.parametrize("mode", MODES)
def test_noise_replaces_its_share_of_the_inputs_and_no_target(mode: SamplingMode) -> None:
    ids = np.repeat(IDS[:4], [100, 200, 300, 400])
    plain, noisy = (
        [dataset(ids, sampling=mode, token_noise=noise)[i] for i in range(60)] for noise in (0.0, 0.25)
    )  # fmt: skip
    assert all(torch.equal(one.targets, other.targets) for one, other in zip(plain, noisy, strict=True))
    before, after = joined(plain).inputs, joined(noisy).inputs
    changed, count = before != after, before.numel()
    expected = 0.25 * 3 / 4  # a token may be replaced by an equal one
    for token in range(4):
        total = (before == token).sum().item()
        share = changed[before == token].float().mean().item()
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / total), token
        share = ((after == token) & changed).sum().item() / ((before != token).sum().item())
        assert share == pytest.approx(0.25 / 4, rel=0.1), "all tokens are equally likely"
    assert abs(changed.float().mean(0) - changed.float().mean()).max() < 5 * math.sqrt(0.25 / (count / 8)), "anywhere"
    assert not torch.equal(changed[:64], changed[64:128]), "each step has its own noise"
    assert torch.equal(noisy[7].inputs, dataset(ids, sampling=mode, token_noise=0.25)[7].inputs)


@pytest.mark.parametrize("mode", MODES)
def test_each_step_and_seed_has_its_own_batch(mode: SamplingMode) -> None:
    starts = {tuple(dataset(sampling=mode)[i].inputs[:, 0].tolist()) for i in range(50)}
    starts |= {tuple(dataset(seed=seed, sampling=mode)[0].inputs[:, 0].tolist()) for seed in range(50)}
    assert len(starts) == 100


def test_in_an_epoch_no_token_is_a_target_twice_and_few_are_missed() -> None:
    rows = joined([dataset(batch_size=41, sampling="epoch")[i] for i in range(6)]).targets  # 2 epochs of 123 windows
    epochs = rows.view(2, -1)
    for targets in epochs:
        counts = torch.bincount(targets, minlength=1000)
        assert counts.max() == 1
        assert counts.sum() == 123 * 8
        assert counts[16:-16].min() == 1, "tokens are missed at the ends only"
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0].sort().values, epochs[1].sort().values), "the next epoch has other windows"
    steps = (rows[1:, 0] - rows[:-1, 0]).abs()
    assert (steps == 8).float().mean() < 0.1, "adjacent windows do not follow each other"


def test_an_epoch_is_a_fixed_function_of_its_seed_and_number() -> None:
    """The documented runs depend on it."""
    assert epoch_starts((60,), 8, 1337, 0).tolist() == [40, 8, 0, 16, 24, 32]


@pytest.mark.parametrize("length", [9, 10, 16, 17, 24, 25, 33])
def test_epochs_of_a_short_text_lie_within_it(length: int) -> None:
    few = dataset(np.arange(length, dtype=np.uint8), sampling="epoch")
    targets = joined([few[i] for i in range(20)]).targets
    assert targets.max() <= length - 1
    assert (targets[:, 0] >= 1).all()
    assert length < 18 or len(targets[:, 0].unique()) > 1


def test_all_starts_are_equally_likely_including_the_last_one() -> None:
    """Twelve windows fit."""
    few = dataset(np.arange(20, dtype=np.uint8))
    starts = joined([few[i] for i in range(300)]).inputs[:, 0]
    counts = torch.bincount(starts, minlength=12)
    assert len(counts) == 12
    assert (counts - 1600).abs().max() < 5 * 1600**0.5


def test_the_largest_fraction_is_below_the_number_of_choices() -> None:
    for choices in (1, 2, 3, 1000, 10**6 + 1, 2**40):
        assert int((1 - 2.0**-53) * choices) == choices - 1


def test_starts_are_fractions_of_the_split() -> None:
    """So a text of another length is sampled at the same relative positions."""
    short = dataset()[3].inputs[:, 0] / (1000 - 8)
    long = dataset(np.arange(60_000, dtype=np.uint16))[3].inputs[:, 0] / (60_000 - 8)
    assert (short - long).abs().max() < 1 / (1000 - 8)


def test_fractions_are_a_fixed_function_of_their_purpose() -> None:
    """The documented runs depend on it."""
    assert uniform(2, 1337, "batch", 0).tolist() == uniform(5, 1337, "batch", 0).tolist()[:2]
    assert [round(x, 12) for x in uniform(2, 1337, "batch", 0).tolist()] == [0.628268319219, 0.363120934399]


def loaded(path: Path, workers: int) -> list[Batch]:
    data = text_module(path, num_workers=workers)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=2, accumulate_grad_batches=2, max_steps=4, max_epochs=-1, world_size=1, global_rank=0,
        overfit_batches=0,
    )  # fmt: skip
    return list(islice(data.train_dataloader(), 4))


def test_workers_make_the_same_batches_and_a_resumed_run_continues_with_the_next(text_path: Path) -> None:
    alone = loaded(text_path, 0)
    expected = TrainDataset(text_module(text_path).tokens("train"), 8, 4, seed=1, accumulate=2)
    assert all(equal(batch, expected[i]) for i, batch in enumerate(alone, 4))
    assert all(equal(one, other) for one, other in zip(alone, loaded(text_path, 2), strict=True))


def test_a_worker_maps_the_tokens_and_receives_no_copy(text_path: Path) -> None:
    text_path.write_text(TEXT * 50, "utf-8")
    data = text_module(text_path)
    original = TrainDataset(data.read().tokens["train"].ids, 8, 64, seed=1)
    pickled = pickle.dumps(original)
    assert len(pickled) < 2000 < data.tokens("train").nbytes
    copy = pickle.loads(pickled)
    assert all(equal(original[i], copy[i]) for i in range(3))


def test_making_loaders_leaves_the_global_random_numbers_alone(text_path: Path) -> None:
    before = torch.get_rng_state()
    for workers, _ in product((0, 1), range(2)):
        loaded(text_path, workers)
    assert torch.equal(torch.get_rng_state(), before)
