"""Which evaluation best.ckpt is of, when several are equal. How a run is saved and resumed is in tests/integration."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

from conftest import TINY, Outcome

from minigpt_pl.checkpoint.io import read_checkpoint

STILL = ("--model.lr", 1e-30, "--model.muon_lr", 1e-30, "--early_stopping", "null")  # too small to change a loss


def test_the_first_of_equal_evaluations_is_the_best(minigpt: Callable[..., Outcome], tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = ("--data.eval_every", 2, "--trainer.max_steps", 6)
    assert minigpt("fit", *TINY, *STILL, *steps, "--run_dir", run).status == 0
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        losses = {row["step"]: row["val/loss"] for row in csv.DictReader(file) if row["split"] == "val"}
    assert list(losses) == ["2", "4", "6"]
    assert len(set(losses.values())) == 1
    assert json.loads((run / "summary.json").read_text("utf-8"))["best_step"] == 2
    assert read_checkpoint(run / "best.ckpt")["global_step"] == 2
