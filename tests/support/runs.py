"""What the tests of stopping and resuming share: small runs, stops at a chosen moment, and the comparison of runs.

How real processes are started and killed is in `processes`.
"""

import csv
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from minigpt_pl.__main__ import main
from minigpt_pl.training.lit_modules import LanguageModel
from minigpt_pl.training.summary import RunSummary

SMALL = (
    "-c", "smoke", "--wandb", "null", "--samples", "null", "--model.n_embd", 16, "--model.block_size", 16,
    "--data.batch_size", 4, "--data.eval_every", 5, "--trainer.max_steps", 16, "--trainer.log_every_n_steps", 3,
    "--model.dropout", 0.1, "--checkpoint.every_n_train_steps", 4, "--trainer.enable_progress_bar", "false",
)  # fmt: skip
"""Options of a run of half a second: an evaluation every 5 of 16 steps, metrics every 3, a checkpoint every 4."""

SIZES = (
    "--model.n_layer", 1, "--model.n_head", 2, "--model.n_embd", 16, "--model.block_size", 16, "--data.batch_size", 4,
    "--data.eval_every", 4, "--trainer.max_steps", 12, "--trainer.log_every_n_steps", 5,
    "--data.max_eval_tokens", 320,
)  # fmt: skip
OFF = ("--wandb", "null", "--samples", "null")
"""Sizes of a run of 12 steps that log and evaluate at different steps, and what it does without."""

TIMES = {"wall_seconds", "tokens_per_s", "perf/tokens_per_s", "seconds", "timed_seconds", "timed_tokens", "git_commit"}
"""Values that differ between two equal runs."""


def flat(node: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by their path, without times."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return {name: node}
    return {path: leaf for key, item in items if key not in TIMES for path, leaf in flat(item, f"{name}/{key}").items()}


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text("utf-8"))


def contents(run_dir: Path) -> dict[str, Any]:
    """Everything in a run directory, by name: both checkpoints, metrics, summary, configuration, samples."""
    result = {"config.yaml": (run_dir / "config.yaml").read_text("utf-8")}
    for name in ("last", "best"):
        checkpoint = torch.load(run_dir / f"{name}.ckpt", weights_only=True)
        for left_out in ("loops", "wandb_id", "digest"):
            del checkpoint[left_out]
        result |= flat(checkpoint, name)
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            result |= flat({key: value for key, value in row.items() if value}, f"metrics.csv/{number}")
    result |= flat(summary(run_dir), "summary.json")
    if (samples := run_dir / "samples.txt").exists():
        result["samples.txt"] = samples.read_text("utf-8")
    return result


def differences(expected: Path, run_dir: Path) -> list[str]:
    """The names whose values differ between two runs in any bit, except times; with both values if they are short."""
    left, right = contents(expected), contents(run_dir)
    out = []
    for name in sorted(left.keys() | right.keys()):
        a, b = left.get(name), right.get(name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.dtype != b.dtype or not torch.equal(a, b):
                out.append(f"{name}: tensors differ")
        elif type(a) is not type(b) or a != b:
            out.append(f"{name}: {a!r:.60} != {b!r:.60}")
    return out


@contextmanager
def at_micro_batch(number: int, do: Callable[[], Any]) -> Iterator[None]:
    """Calls `do` in the middle of a micro-batch, counted from 1 over the whole run."""
    original = LanguageModel.training_step

    def step(self: LanguageModel, batch: Any, batch_idx: int) -> Any:
        if batch_idx + 1 == number:
            do()
        return original(self, batch, batch_idx)

    with patch.object(LanguageModel, "training_step", step):
        yield


@contextmanager
def at_evaluation(step: int, do: Callable[[], Any]) -> Iterator[None]:
    """Calls `do` in the middle of the evaluation after a step."""
    original = LanguageModel.validation_step

    def evaluate(self: LanguageModel, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.trainer.global_step == step and batch_idx == 1:
            do()
        original(self, batch, batch_idx, dataloader_idx)

    with patch.object(LanguageModel, "validation_step", evaluate):
        yield


@contextmanager
def before_summary(do: Callable[[], Any]) -> Iterator[None]:
    """Calls `do` when a run has ended and its summary is not yet written."""
    original = RunSummary.on_train_end

    def end(self: RunSummary, *args: Any) -> None:
        do()
        original(self, *args)

    with patch.object(RunSummary, "on_train_end", end):
        yield


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def snapshot(run_dir: Path, to: Path) -> Callable[[], None]:
    """A function that copies the directory of a run, as SIGKILL would leave it."""
    return lambda: shutil.copytree(run_dir, to, ignore=shutil.ignore_patterns(".lock", ".lease"))


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def eval_steps(run: Path) -> list[int]:
    return [int(row["step"]) for row in rows_of(run) if row["split"] == "val"]


def train_small(home: Path, *options: object) -> Path:
    """Trains a run of SMALL options on a text of its own; returns the run directory."""
    (home / "text.txt").write_text("the sea comes in, the sea goes out.\n" * 60, "utf-8")
    args = ("fit", *SMALL, *options, "--data.path", home / "text.txt", "--run_dir", home / "run")
    assert main([str(arg) for arg in args]) == 0
    return home / "run"
