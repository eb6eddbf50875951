"""What an evaluation counts: every target once, for any sizes, and the metrics of exactly these targets.

How a text becomes tokens is tested in tests/data; when an evaluation happens in test_fit.
"""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.functional import cross_entropy

from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.datasets import IGNORE_INDEX, EvalBatch
from minigpt_pl.runtime.seeding import uniform
from minigpt_pl.training.lit_modules import ClassicLM

KINDS = ("char", "bpe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def module(folder: Path, text: str, **changes: Any) -> TextDataModule:
    path = folder / "text.txt"
    path.write_text(text, "utf-8", newline="")
    plain = {"block_size": 8, "batch_size": 4, "eval_every": 10, "seed": 1, "bpe_vocab_size": len(set(text)) + 20}
    return TextDataModule(path=str(path), **{**plain, **changes})


def scored(batches: list[EvalBatch]) -> tuple[list[int], list[int], list[int]]:
    """Inputs and targets where a batch does not pad, in order, and summed counts."""
    inputs, targets, counts = (torch.cat(fields) for fields in zip(*batches, strict=True))
    real = targets != IGNORE_INDEX
    return inputs[real].tolist(), targets[real].tolist(), counts.sum(0).tolist()


def whole_split(data: TextDataModule, split: str = "val") -> list[EvalBatch]:
    batches = data.eval_dataset(split)
    return [batches[i] for i in range(len(batches))]


def validate(data: TextDataModule, scale: float = 50) -> dict[str, float]:
    """Metrics of a model with random weights; with scale 0 it predicts all tokens with equal probability."""
    return evaluate(lively_model(data, scale), data)


def lively_model(data: TextDataModule, scale: float) -> ClassicLM:
    """A tiny model with random weights, those of the head times `scale`."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": data.vocab_size,
        "block_size": data.config.block_size,
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 8,
    }
    model = ClassicLM(lr=1e-3, dropout=0.0, weight_decay=0.0, **sizes)
    with torch.no_grad():
        model.net.head.weight.mul_(scale)
    return model


def evaluate(model: ClassicLM, data: TextDataModule) -> dict[str, float]:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", use_distributed_sampler=False, **quiet).validate(model, data, verbose=False)  # type: ignore[arg-type]
    return model.eval_metrics


# Every target, once.


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 9))
def test_a_full_evaluation_scores_every_target_once_for_any_sizes(
    folder: Path, size: int, block: int, batch: int
) -> None:
    text = "abcdefghij" * 30 + "".join(chr(0x4E00 + i) for i in range(size + 1))
    data = module(folder, text, block_size=block, batch_size=batch, train_frac=(300 + 0.5) / len(text))
    ids = data.tokens("val").tolist()
    assert len(set(ids)) == len(ids) == size + 1
    batches = whole_split(data)
    inputs, targets, counts = scored(batches)
    assert (inputs, targets) == (ids[:-1], ids[1:])
    assert counts[0] == size
    assert {batch.inputs.shape for batch in batches} == {(batch, block)}, "one shape, so that nothing is compiled twice"
    firsts = [
        ids.index(int(row[0])) for b in batches for row, count in zip(b.inputs, b.counts, strict=True) if count[0]
    ]
    assert firsts == list(range(0, size, block)), "windows start at multiples of block_size"


TEXTS = st.text(min_size=2, max_size=60) | st.text("ab海\n", min_size=30, max_size=60)
"""Only with few distinct characters byte pairs are merged: then tokens and characters differ in number."""


@settings(max_examples=25)
@given(TEXTS, st.integers(1, 12), st.integers(1, 5))
def test_the_metrics_of_a_uniform_model_are_known_numbers(folder: Path, val: str, block: int, batch: int) -> None:
    val = val.replace("\r\n", "\n")
    train = "".join(chr(0x3B1 + i) for i in range(20)) + val  # twenty tokens at least, however well the rest merges
    for kind in KINDS:
        fraction = (len(train) + 0.5) / len(train + val)
        data = module(folder, train + val, block_size=block, batch_size=batch, tokenizer=kind, train_frac=fraction)
        first, *others = data.tokens("val").tolist()
        after_first = val[len(data.tokenizer.vocabulary[first]) :]
        nats = len(others) * math.log(data.vocab_size)
        assert validate(data, scale=0) == pytest.approx(
            {
                "val/loss": math.log(data.vocab_size),
                "val/nats_per_char": nats / len(after_first),
                "val/bits_per_byte": nats / math.log(2) / len(after_first.encode()),
                "val/perplexity": data.vocab_size,
            },
            rel=1e-6,
        )


TEXT = "".join(f"line {i}: the sea comes in,\n the 海 goes öut 🌊.\n" for i in range(60))


def test_the_metrics_of_a_text_that_is_split_by_tokens_are_of_its_own_characters(folder: Path) -> None:
    data = module(folder, TEXT, tokenizer="bpe", split_unit="tokens", bpe_across_lines=True)
    first, *others = data.tokens("val").tolist()
    scored_text = data.tokenizer.decode(others)
    assert TEXT.endswith(scored_text)
    assert len(scored_text) + len(data.tokenizer.vocabulary[first]) != len(TEXT) - int(0.9 * len(TEXT))
    metrics, nats = validate(data, scale=0), len(others) * math.log(data.vocab_size)
    assert metrics["val/nats_per_char"] == pytest.approx(nats / len(scored_text), rel=1e-6)
    assert metrics["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / len(scored_text.encode()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_do_not_depend_on_padding_or_batch_size(folder: Path, kind: str) -> None:
    found = [validate(module(folder, TEXT, tokenizer=kind, batch_size=size)) for size in (1, 5, 64)]
    assert found[0]["val/loss"] > 1.5 * math.log(60), "the model is far from uniform"
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


def test_a_subsampled_evaluation_reads_evenly_spaced_windows_and_reports_it(folder: Path) -> None:
    text = "abcdefghij" * 30 + "".join(chr(0x4E00 + i) for i in range(1001))
    fraction = 300.5 / len(text)
    every = module(folder, text, train_frac=fraction)
    assert every.subsampling_note("val") is None
    data = module(folder, text, train_frac=fraction, max_eval_tokens=30 * 8)
    assert (
        data.subsampling_note("val")
        == "data.max_eval_tokens 240: an evaluation of val reads 30 of 125 windows, evenly spaced"
    )
    starts = data.eval_dataset("val").starts
    assert set(starts) <= set(every.eval_dataset("val").starts)
    assert len(starts) == 30
    assert set(np.diff(starts)) == {4 * 8, 5 * 8}
    assert starts[0] == 0
    assert scored(whole_split(data))[2][0] == 240
    assert module(folder, text, train_frac=fraction, max_eval_tokens=1).eval_dataset("val").starts.tolist() == [0]


# The reference report's estimator.


def at(
    step: int, data: TextDataModule, rank: int = 0, world: int = 1, fn: TrainerFn = TrainerFn.FITTING
) -> TextDataModule:
    """A datamodule whose run has completed so many steps."""
    run = {"global_step": step, "global_rank": rank, "world_size": world, "state": SimpleNamespace(fn=fn)}
    data.trainer = SimpleNamespace(**run)  # type: ignore[assignment]
    return data


def sampled(folder: Path, **changes: Any) -> TextDataModule:
    return module(folder, TEXT, **{"eval_mode": "sampled", "eval_iters": 5, **changes})


def read_windows(batch: EvalBatch) -> list[list[int]]:
    """Inputs of the rows that are not padding."""
    return batch.inputs[batch.counts[:, 3] > 0].tolist()


def test_a_sampled_evaluation_draws_its_windows_from_seed_and_step(folder: Path) -> None:
    def windows(step: int, **changes: Any) -> list[list[int]]:
        batches = list(at(step, sampled(folder, **changes)).eval_dataloader("val", True))
        counts = torch.cat([batch.counts for batch in batches])
        assert set(counts[counts[:, 3] > 0, 0].tolist()) == {8}, "whole windows only"
        assert counts[:, 3].sum() == 20
        return [row for batch in batches for row in read_windows(batch)]

    once = windows(10)
    assert windows(10) == once
    assert windows(10, num_workers=1) == once
    assert windows(20) != once
    assert windows(10, seed=2) != once
    data = sampled(folder)
    data.load_state_dict(sampled(folder).state_dict() | {"step": 10})
    again = [row for batch in at(0, data).eval_dataloader("val", True) for row in read_windows(batch)]
    assert again == once, "validate repeats the evaluation of the checkpoint's step"


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampled_evaluation_is_the_mean_over_windows_drawn_with_replacement(folder: Path, kind: str) -> None:
    data = sampled(folder, eval_iters=50, batch_size=7, tokenizer=kind)
    model = lively_model(data, 50)
    ids = torch.from_numpy(data.tokens("val").astype(np.int64))
    fractions = uniform(50 * 7, 1, "check", "val", 0)  # an evaluation without a run is that of step 0
    starts = [int(fraction * (len(ids) - 8)) for fraction in fractions]
    nats, tokens, characters = 0.0, 0, 0
    for start in starts:
        window = ids[start : start + 9]
        with torch.no_grad():
            nats += cross_entropy(model.net(window[None, :-1])[0][0], window[1:], reduction="sum").item()
        tokens += 8
        characters += len(data.tokenizer.decode(window[1:].tolist()))
    metrics = evaluate(model, data)
    assert metrics["val/loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert metrics["val/nats_per_char"] == pytest.approx(nats / characters, rel=1e-6)
    assert len(set(starts)) < 0.8 * len(starts), "many windows are drawn several times"


def test_a_window_that_is_drawn_several_times_is_read_once(folder: Path) -> None:
    data = at(10, sampled(folder, eval_iters=200, batch_size=32))
    choices = len(data.tokens("val")) - 8
    for step in (10, 20):
        batches = list(at(step, data).eval_dataloader("val", True))
        assert len(batches) == -(-choices // 32), "as many at each step, and no more than there are windows"
        draws = torch.cat([batch.counts[:, 3] for batch in batches])
        assert draws.sum() == 200 * 32
        assert (draws > 0).sum() <= choices


def test_a_sampled_evaluation_reaches_every_window(folder: Path) -> None:
    data = sampled(folder, eval_iters=200, batch_size=32)
    reached = {tuple(row) for batch in at(10, data).eval_dataloader("val", True) for row in read_windows(batch)}
    ids = data.tokens("val").tolist()
    assert reached == {tuple(ids[i : i + 8]) for i in range(len(ids) - 8)}


def test_a_sampled_evaluation_reads_both_splits_in_fit_and_one_afterwards(folder: Path) -> None:
    loaders = at(10, sampled(folder)).val_dataloader()
    assert isinstance(loaders, list)
    data = sampled(folder)
    for split, loader in zip(("val", "train"), loaders, strict=True):
        text = data.tokenizer.decode(data.tokens(split).tolist())
        for batch in loader:
            assert all(data.tokenizer.decode(row) in text for row in read_windows(batch))
    assert not isinstance(at(10, sampled(folder), fn=TrainerFn.VALIDATING).val_dataloader(), list)
    assert not isinstance(at(10, module(folder, TEXT)).val_dataloader(), list)


# Several processes.


@pytest.mark.parametrize("mode", ["full", "sampled"])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_an_evaluation_without_loss_or_duplicates(folder: Path, mode: str, world: int) -> None:
    def rows(rank: int, world: int) -> list[tuple[list[int], list[int]]]:
        data = at(10, module(folder, TEXT, eval_iters=40), rank, world)
        batches = list(data.eval_dataloader("val", mode == "sampled"))
        lengths.add(len(batches))
        return [(x, n) for b in batches for x, n in zip(b.inputs.tolist(), b.counts.tolist(), strict=True) if n[0] > 0]

    lengths: set[int] = set()
    alone = rows(0, 1)
    lengths.clear()
    shares = [row for rank in range(world) for row in rows(rank, world)]
    assert sorted(shares) == sorted(alone)
    assert len(lengths) == 1, "each process has as many batches, or the others wait for it"


# Through the command line.


def test_a_sampled_run_logs_both_splits_and_validate_repeats_its_last_evaluation(
    minigpt: Callable[..., Outcome], tmp_path: Path
) -> None:
    options = ("--data.eval_mode", "sampled", "--data.eval_iters", 3, "--trainer.max_steps", 10)
    assert minigpt("fit", *TINY, *options, "--run_dir", tmp_path / "r").status == 0
    with (tmp_path / "r" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        (evaluation,) = [row for row in csv.DictReader(file) if row["split"] == "val"]
    assert 3 < float(evaluation["train/eval_loss"]) < 5
    again = minigpt("validate", "--ckpt_path", tmp_path / "r" / "last.ckpt")
    metrics = dict(line.split() for line in again.out.splitlines())
    assert float(metrics["val/loss"]) == pytest.approx(float(evaluation["val/loss"]), abs=1e-6)
    assert "train/eval_loss" not in metrics
