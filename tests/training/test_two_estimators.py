"""Evaluations with eval_mode both: the sampled estimate chooses, the exact loss stands beside it.

What either of them counts is tested in test_counting; that both survive a resume, in tests/integration.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from support.runs import OFF, SIZES, rows_of, summary

from minigpt_pl.__main__ import main
from minigpt_pl.checkpoint.io import read_checkpoint

MODES = {
    "sampled": ("--data.eval_mode", "sampled", "--data.eval_iters", 1),
    "full": (),
    "both": ("--data.eval_mode", "both", "--data.eval_iters", 1),
}
STEPS = ("--data.eval_every", 1, "--model.lr", 1, "--model.muon_lr", 1, "--model.qk_norm", "false")
"""The loss falls, then rises."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training, evaluated in each mode."""
    home = tmp_path_factory.mktemp("runs")
    for mode, options in MODES.items():
        words = ("fit", *SIZES, *OFF, *STEPS, *options, "--run_dir", home / mode)
        assert main([str(word) for word in words]) == 0
    return {mode: home / mode for mode in MODES}


def column(run: Path, name: str) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in rows_of(run) if row["split"] == "val"}


def test_both_logs_what_either_would(runs: dict[str, Path]) -> None:
    for name in ("loss", "nats_per_char"):
        assert column(runs["both"], f"val/{name}") == column(runs["sampled"], f"val/{name}")
        assert column(runs["both"], f"val/full_{name}") == column(runs["full"], f"val/{name}")
    assert "train/eval_loss" in rows_of(runs["sampled"])[0]
    assert "train/eval_loss" not in rows_of(runs["both"])[0]
    assert not {"val/full_loss", "val/full_nats_per_char"} & rows_of(runs["full"])[0].keys()


def test_the_estimate_chooses_and_the_summary_says_what_it_was_worth(runs: dict[str, Path]) -> None:
    both, sampled, full = (summary(runs[mode]) for mode in ("both", "sampled", "full"))
    assert sampled["best_step"] != full["best_step"] < 12, "the estimators disagree, or this test shows nothing"
    for name in ("best_val", "best_step", "best_nats_per_char", "best_bits_per_byte", "final_val_loss"):
        assert both[name] == sampled[name]
    assert read_checkpoint(runs["both"] / "best.ckpt")["global_step"] == sampled["best_step"]
    assert (both["best_full_val"], both["best_full_step"]) == (full["best_val"], full["best_step"])
    assert both["full_val_at_best"] == column(runs["full"], "val/loss")[sampled["best_step"]]
    assert both.keys() - sampled.keys() == {"best_full_val", "best_full_step", "full_val_at_best"}
    assert sampled.keys() == full.keys()


def test_validate_and_test_print_both(runs: dict[str, Path], minigpt: Callable[..., Outcome]) -> None:
    done = minigpt("validate", "--ckpt_path", runs["both"] / "best.ckpt")
    metrics = {name: float(value) for name, value in (line.split() for line in done.out.splitlines())}
    expected = summary(runs["both"])
    assert metrics["val/loss"] == pytest.approx(expected["best_val"], abs=1e-6)
    assert metrics["val/full_loss"] == pytest.approx(expected["full_val_at_best"], abs=1e-6)
    tested = minigpt("test", "--ckpt_path", runs["both"] / "best.ckpt", "--data.test_frac", 0.05)
    assert [line.split()[0] for line in tested.out.splitlines()] == [name.replace("val", "test") for name in metrics]


def test_an_evaluation_line_shows_both(minigpt: Callable[..., Outcome], tmp_path: Path) -> None:
    done = minigpt("fit", *SIZES, *OFF, *MODES["both"], "--run_dir", tmp_path / "run")
    exact = column(tmp_path / "run", "val/full_loss")
    assert all(f"val/full_loss {loss:.4f}" in done.out for loss in exact.values())
