"""DDP on two cores: two processes of one thread each against one process, without evaluations and saves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.measuring import Report

pytestmark = pytest.mark.bench
PLAIN = ("--model.block_size", "128", "--model.conv_kernel_size", "0", "--model.optimizer", "adamw")
QUIET = ("--samples", "null", "--wandb", "null", "--data.eval_every", "1000", "--data.max_eval_tokens", "2048")
COMPETITORS = {"two processes": ("--trainer.strategy", "ddp", "--trainer.devices", "2"), "one process": ()}


@pytest.mark.parametrize(("batch_size", "steps"), [(16, 100), (64, 30)])
def test_two_processes(report: Report, tmp_path: Path, batch_size: int, steps: int) -> None:
    """A small batch, and one four times as large."""
    speeds: dict[str, list[float]] = {name: [] for name in COMPETITORS}
    args = ["--trainer.accelerator", "cpu", "--data.batch_size", str(batch_size), "--trainer.max_steps", str(steps)]
    for turn in range(4):
        for name, more in COMPETITORS.items():
            run = tmp_path / f"{name} {turn}"
            command = [sys.executable, "-m", "minigpt_pl", "fit", "--run_dir", str(run), *PLAIN, *QUIET, *args, *more]
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
            speeds[name].append(json.loads((run / "summary.json").read_text("utf-8"))["tokens_per_s"])
    report.add(f"training, batches of {batch_size} windows", "tokens/s", speeds)
