"""A run that diverges reports it, and keeps the last finite state."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from support.runs import SMALL, summary

from minigpt_pl.checkpoint.io import iter_tensors, read_checkpoint
from minigpt_pl.training.lit_modules import LanguageModel

Call = Callable[..., Outcome]


@pytest.fixture
def fit(minigpt: Call, tmp_path: Path, text_file: Path) -> Call:
    return lambda *options: minigpt("fit", *SMALL, "--data.path", text_file, "--run_dir", tmp_path / "run", *options)


def check_divergence(outcome: Outcome, run: Path, *, last: int, best: int | None) -> None:
    """Exit status 3 and one line; both checkpoints are finite, and of these steps."""
    assert outcome.status == 3
    assert outcome.err.splitlines()[-1].startswith("error: the run diverged at step ")
    assert outcome.err.count("error") == 1
    assert summary(run)["stop_reason"] == "diverged"
    for name, step in (("last", last), ("best", best)):
        if step is None:
            assert not (run / f"{name}.ckpt").exists()
            continue
        checkpoint = read_checkpoint(run / f"{name}.ckpt")
        assert checkpoint["global_step"] == step
        assert all(
            tensor.isfinite().all()
            for _, tensor in iter_tensors([checkpoint["state_dict"], checkpoint["optimizer_states"]])
        )
    for line in (run / "metrics.csv").read_text("utf-8").splitlines():
        assert not {"nan", "inf"} & set(line.split(","))


def test_a_learning_rate_that_is_much_too_high(fit: Call, tmp_path: Path) -> None:
    outcome = fit("--model.lr", 1e30, "--trainer.gradient_clip_val", "null", "--checkpoint.every_n_train_steps", 1)
    assert outcome.status == 3
    last = read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"]
    assert last < 5
    check_divergence(outcome, tmp_path / "run", last=last, best=None)


@pytest.mark.parametrize("last", [1, 4])
def test_a_nan_weight_between_two_logs_never_reaches_a_checkpoint(
    fit: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """It happens in step 7: after the evaluation at 5, and before the metrics at 9 or, with `last` 1, the next save."""
    original = LanguageModel.training_step

    def poisoned(self: LanguageModel, batch: object, batch_idx: int) -> torch.Tensor:
        loss = original(self, batch, batch_idx)
        return loss * math.nan if self.trainer.global_step == 6 else loss

    monkeypatch.setattr(LanguageModel, "training_step", poisoned)
    outcome = fit("--checkpoint.every_n_train_steps", last, "--trainer.log_every_n_steps", 9)
    check_divergence(outcome, tmp_path / "run", last=6 if last == 1 else 5, best=5)


def test_a_nan_loss_in_an_evaluation(fit: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LanguageModel.sequence_nll

    def poisoned(self: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return original(self, inputs, targets) * (math.nan if self.trainer.global_step == 10 else 1)

    monkeypatch.setattr(LanguageModel, "sequence_nll", poisoned)
    check_divergence(fit(), tmp_path / "run", last=8, best=5)


def test_a_diverged_run_resumes_with_a_lower_learning_rate(
    fit: Call, minigpt: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit("--model.lr", 1e30).status == 3
    outcome = minigpt("fit", "--run_dir", tmp_path / "run", "--ckpt_path", "last", "--model.lr", 0.001)
    assert outcome.status == 0
    result = summary(tmp_path / "run")
    assert (result["stop_reason"], result["total_steps"]) == ("completed", 16)
    assert math.isfinite(result["best_val"])
