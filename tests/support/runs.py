"""What the tests of stopping and continuing share: small runs, runs stopped at a chosen place, and their comparison.

How real processes are started and killed is in `kills`.
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

from minigpt_pl.training.lit_modules import LanguageModel
from minigpt_pl.training.summary import RunSummary

SMALL = (
    "-c", "smoke", "--wandb", "null", "--samples", "null", "--model.n_embd", 16, "--model.block_size", 16,
    "--data.batch_size", 4, "--data.eval_every", 5, "--trainer.max_steps", 16, "--trainer.log_every_n_steps", 3,
    "--model.dropout", 0.1, "--checkpoint.every_n_train_steps", 4, "--trainer.enable_progress_bar", "false",
)  # fmt: skip
"""Options of a run of half a second: dropout, a check every 5 of 16 steps, figures every 3, a save every 4."""

TIMES = {"wall_seconds", "tokens_per_s", "perf/tokens_per_s", "seconds", "timed_seconds", "timed_tokens"}
"""What differs between two equal runs."""


def flat(node: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by their place; times left out."""
    if isinstance(node, dict):
        parts = node.items()
    elif isinstance(node, (list, tuple)):
        parts = enumerate(node)
    else:
        return {name: node}
    return {
        place: leaf for key, part in parts if key not in TIMES for place, leaf in flat(part, f"{name}/{key}").items()
    }


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text("utf-8"))


def contents(run_dir: Path) -> dict[str, Any]:
    """All that a run has left, by name: both checkpoints, the figures, the summary, the settings, the samples."""
    found = {"config.yaml": (run_dir / "config.yaml").read_text("utf-8")}
    for name in ("last", "best"):
        checkpoint = torch.load(run_dir / f"{name}.ckpt", weights_only=True)
        for left_out in ("loops", "wandb_id", "digest"):
            del checkpoint[left_out]
        found |= flat(checkpoint, name)
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            found |= flat({key: value for key, value in row.items() if value}, f"metrics.csv/{number}")
    found |= flat(summary(run_dir), "summary.json")
    if (samples := run_dir / "samples.txt").exists():
        found["samples.txt"] = samples.read_text("utf-8")
    return found


def differences(expected: Path, found: Path) -> list[str]:
    """The names under which two runs differ in any bit, times aside; with both values where they are short."""
    left, right = contents(expected), contents(found)
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
    """Calls `do` in the midst of a micro-batch, counted from 1 over the whole run."""
    original = LanguageModel.training_step

    def step(self: LanguageModel, batch: Any, batch_idx: int) -> Any:
        if batch_idx + 1 == number:
            do()
        return original(self, batch, batch_idx)

    with patch.object(LanguageModel, "training_step", step):
        yield


@contextmanager
def at_check(step: int, do: Callable[[], Any]) -> Iterator[None]:
    """Calls `do` in the midst of the check after a step."""
    original = LanguageModel.validation_step

    def check(self: LanguageModel, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.trainer.global_step == step and batch_idx == 1:
            do()
        original(self, batch, batch_idx, dataloader_idx)

    with patch.object(LanguageModel, "validation_step", check):
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
    """Something to do in the midst of a run: copy its directory, as SIGKILL would leave it."""
    return lambda: shutil.copytree(run_dir, to, ignore=shutil.ignore_patterns(".lock"))
