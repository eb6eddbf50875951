"""`--ema_decay`: what is averaged, where the average is used, and that such a run resumes bit-exact."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from support.runs import SMALL, at_evaluation, at_micro_batch, before_summary, differences, interrupt, snapshot, summary

from minigpt_pl.checkpoint.io import TRAINED_WEIGHTS, read_checkpoint, tensor_digest
from minigpt_pl.training.fit import FitRunner

TIED = ("--model.tie_embeddings", "true")
DECAY = 0.6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(60)), "utf-8")
    return path


@pytest.fixture
def fit(text: Path, tmp_path: Path, minigpt):
    def call(name: str, *options: object):
        return minigpt("fit", *SMALL, "--data.path", text, *options, "--run_dir", tmp_path / name)

    return call


class WeightsOfEachStep(Callback):
    """Keeps the trained weights after each step, as float64."""

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append([p.detach().double().clone() for p in pl_module.parameters()])


def test_the_average_is_that_of_the_trained_weights(fit, tmp_path: Path, monkeypatch) -> None:
    """Computed again here from the definition: the first steps count equally, then each one `decay` times the next."""
    seen = WeightsOfEachStep()
    original = FitRunner.callbacks
    monkeypatch.setattr(FitRunner, "callbacks", lambda self, others: [*original(self, others), seen])
    assert fit("run", "--ema_decay", DECAY, *TIED, "--trainer.accumulate_grad_batches", 2).status == 0
    expected = [torch.zeros_like(p) for p in seen.steps[0]]
    for number, weights in enumerate(seen.steps, 1):
        share = max(1 - DECAY, 1 / number)
        expected = [(1 - share) * mean + share * p for mean, p in zip(expected, weights, strict=True)]
    saved = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert len(seen.steps) == 16
    names = [name for name in saved["state_dict"] if name != "net.head.weight"]  # it is tied
    for name, mean, trained in zip(names, expected, seen.steps[-1], strict=True):
        torch.testing.assert_close(saved["state_dict"][name].double(), mean, atol=1e-6, rtol=1e-5)
        assert torch.equal(saved[TRAINED_WEIGHTS][name].double(), trained)
    assert torch.equal(saved["state_dict"]["net.head.weight"], saved["state_dict"]["net.token_embedding.weight"])
    changed = saved[TRAINED_WEIGHTS]["net.norm.weight"].add_(1)
    assert changed.numel()
    assert tensor_digest(saved) != saved["digest"], "a flipped bit of the trained weights is noticed"


def test_evaluations_best_and_samples_are_those_of_the_average(fit, minigpt, tmp_path: Path) -> None:
    high = ("--model.lr", 0.5, "--model.muon_lr", 0.5)  # steps jump about, and their average is better
    samples = ("--samples", '{"every_n_evals": 1, "max_new_tokens": 30, "temperature": 0}')
    assert fit("plain", *high).status == 0
    assert fit("run", "--ema_decay", 0.8, *high, *samples).status == 0
    run, result = tmp_path / "run", summary(tmp_path / "run")
    assert result["best_val"] < summary(tmp_path / "plain")["best_val"]
    assert result["config"]["ema_decay"] == 0.8
    printed = minigpt("validate", "--ckpt_path", run / "best.ckpt").out
    assert float(printed.split()[1]) == pytest.approx(result["best_val"], abs=2e-6)
    greedy = minigpt(
        "predict", "--ckpt_path", run / "last.ckpt", "--sample.temperature", 0, "--sample.max_new_tokens", 30
    )
    assert (run / "samples.txt").read_text("utf-8").endswith(f"=== step 16\n{greedy.out}")


def test_without_it_nothing_is_kept(fit, tmp_path: Path) -> None:
    assert fit("plain").status == 0
    saved = read_checkpoint(tmp_path / "plain" / "last.ckpt")
    assert TRAINED_WEIGHTS not in saved
    assert summary(tmp_path / "plain")["config"]["ema_decay"] is None
    assert fit("tried", "--ema_decay", DECAY).status == 0
    averaged = read_checkpoint(tmp_path / "tried" / "last.ckpt")
    for name, weight in averaged[TRAINED_WEIGHTS].items():
        assert torch.equal(weight, saved["state_dict"][name]), f"{name}: averaging must not change the training"


@pytest.mark.parametrize("stop", ["step", "evaluation", "accumulated"])
def test_a_stopped_run_resumes_bit_exact(fit, minigpt, tmp_path: Path, stop: str) -> None:
    accumulate = 2 if stop == "accumulated" else 1
    options = ("--ema_decay", DECAY, *TIED, "--trainer.accumulate_grad_batches", accumulate)
    samples = ("--samples", '{"every_n_evals": 1, "max_new_tokens": 20}')
    assert fit("straight", *options, *samples).status == 0
    with at_evaluation(10, interrupt) if stop == "evaluation" else at_micro_batch(7 * accumulate, interrupt):
        assert fit("stopped", *options, *samples).status == 130
    assert minigpt("fit", "--run_dir", tmp_path / "stopped", "--ckpt_path", "last").status == 0
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []


def test_a_run_that_died_before_its_summary_writes_the_same_one(fit, minigpt, tmp_path: Path) -> None:
    with before_summary(snapshot(tmp_path / "straight", tmp_path / "killed")):
        assert fit("straight", "--ema_decay", DECAY).status == 0
    assert minigpt("fit", "--run_dir", tmp_path / "killed", "--ckpt_path", "last").status == 0
    assert differences(tmp_path / "straight", tmp_path / "killed") == []


def test_a_run_cannot_go_on_without_its_average(fit, minigpt, tmp_path: Path) -> None:
    assert fit("run", "--ema_decay", DECAY).status == 0
    resume = ("fit", "--run_dir", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", 20)
    outcome = minigpt(*resume, "--ema_decay", "null")
    last = tmp_path / "run" / "last.ckpt"
    assert outcome.err == (
        f"error: --ema_decay null: {last} was trained with {DECAY}; leave it out, or train a new model\n"
    )
    outcome = minigpt(*resume, "--ema_decay", "0.7")
    assert (outcome.status, outcome.err.splitlines()[0]) == (0, f"ema_decay: {DECAY} -> 0.7")
    outcome = fit("both", "--ema_decay", DECAY, "--trainer.callbacks", "EMAWeightAveraging")
    assert outcome.err == f"error: --ema_decay {DECAY}: a callback averages too; use one of them\n"
    assert fit("run2", "--ema_decay", "1").err.startswith("error: --ema_decay 1: it must be ")
