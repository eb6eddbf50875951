"""The cost of crash safety: last.ckpt, digests, synced and renamed files, checks for signals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.measuring import Report

from minigpt_pl.__main__ import main
from minigpt_pl.checkpoint.io import AtomicCheckpointIO
from minigpt_pl.cli.app import MiniGPTCLI
from minigpt_pl.training.callbacks import StepSeeder
from minigpt_pl.training.checkpointing import LastCheckpoint
from minigpt_pl.training.stopping import GracefulStop

pytestmark = pytest.mark.bench
STEPS = 200  # saves and evaluations are as frequent as in the whole default run


def plain_save(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
    torch.save(checkpoint, path)


def seconds(run_dir: Path) -> float:
    """Seconds of STEPS steps of the default configuration, with evaluations."""
    args = ["fit", "--run_dir", str(run_dir), "--trainer.max_steps", str(STEPS), "--trainer.accelerator", "cpu"]
    assert main([*args, "--wandb", "null", "--samples", "null"]) == 0
    return json.loads((run_dir / "summary.json").read_text())["wall_seconds"]


def test_crash_safety(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off means: best.ckpt is a plain torch.save, no last.ckpt, no checks for signals, no step is seeded."""
    times: dict[str, list[float]] = {"on": [], "off": []}
    for turn in range(6):
        order = ("on", "off") if turn % 2 else ("off", "on")
        for name in order:
            with monkeypatch.context() as patch:
                patch.setattr(MiniGPTCLI, "close", lambda self: None)  # it would verify the digest of best.ckpt
                if name == "off":
                    patch.setattr(LastCheckpoint, "_save", lambda self, trainer: None)
                    patch.setattr(AtomicCheckpointIO, "save_checkpoint", plain_save)
                    patch.setattr(GracefulStop, "_check", lambda self, trainer, pl_module: None)
                    patch.setattr(StepSeeder, "on_train_batch_start", lambda *_: None)
                times[name].append(seconds(tmp_path / f"{name}-{turn}"))
    slower = sorted(on / off - 1 for on, off in zip(times["on"], times["off"], strict=True))
    note = f"slower by {slower[len(slower) // 2]:+.2%} [{slower[0]:+.2%} ... {slower[-1]:+.2%}]"
    report.add(f"{STEPS} steps of the default configuration with evaluations", "s", times, note)
