"""The command doctor: its checks pass on this machine, and find a leak and a harmful version."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from minigpt_pl.cli.doctor import harmful_versions, is_causal
from minigpt_pl.models import attention
from minigpt_pl.models.config import ClassicConfig
from minigpt_pl.models.gpt import ClassicGPT


@pytest.fixture
def doctor(minigpt, monkeypatch, tmp_path, text_file):
    """Runs the command in an empty directory, with a small model and text."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return lambda *args: minigpt("doctor", "-c", "smoke", "--data.path", text_file, *args)


class Leaky(ClassicGPT):
    """A model whose logits see the mean of the whole window."""

    def forward(self, ids, cache=None):
        logits, aux = super().forward(ids, cache)
        return logits + self.head(self.token_embedding(ids).mean(1, keepdim=True)), aux


@pytest.mark.parametrize(("kind", "causal"), [(ClassicGPT, True), (Leaky, False)])
def test_a_leak_is_found(kind, causal):
    config = ClassicConfig(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.0)
    model = kind(config, seed=1).eval()
    ids = torch.arange(16).view(2, 8) % 7
    assert is_causal(model, ids, torch.no_grad) is causal


@pytest.mark.parametrize(
    ("args", "checked_in"),
    [
        (("--trainer.precision", "32"), "32-true"),
        (("--trainer.precision", "bf16-mixed"), "bf16-mixed"),
        (("--trainer.precision", "bf16-mixed", "-c", "moe"), "32-true"),  # in bf16, rounding would hide it
    ],
)
def test_a_leak_is_found_in_a_model_with_zero_initialisation(doctor, monkeypatch, args, checked_in):
    """The logits of the default model are all 0 at first, whatever its attention sees."""
    outcome = doctor(*args)
    assert f"ok  causality: a later token does not change earlier logits in {checked_in}" in outcome.out
    monkeypatch.setattr(attention, "attend", lambda q, k, v, dropout: F.scaled_dot_product_attention(q, k, v))
    outcome = doctor(*args)
    assert outcome.status == 2
    assert f"BAD causality: a later token changes earlier logits in {checked_in}" in outcome.out


def test_harmful_versions():
    good = {"torch": "2.13.0+cpu", "lightning": "2.6.6"}
    assert list(harmful_versions(good, "mps", "bf16-mixed")) == []
    (leak,) = harmful_versions(good | {"torch": "2.12.1"}, "mps", "bf16-mixed")
    assert "leaks future tokens" in leak
    assert list(harmful_versions(good | {"torch": "2.12.1"}, "mps", "32-true")) == []
    (malware,) = harmful_versions(good | {"lightning": "2.6.3"}, "cpu", "32-true")
    assert "malware" in malware


def test_a_failed_check_sets_the_exit_status(doctor, monkeypatch):
    monkeypatch.setattr("minigpt_pl.training.summary.version", lambda name: "2.6.3")
    outcome = doctor()
    assert outcome.status == 2
    assert "  BAD versions: lightning 2.6.3" in outcome.out
    assert outcome.out.splitlines()[-1] == "some checks failed: see the lines that begin with BAD"


def test_help_describes_the_command(minigpt):
    lines = minigpt("doctor", "--help").out.splitlines()
    assert lines[0] == "usage: minigpt doctor [options]"
    assert lines[1].startswith("Checks this machine")


def test_the_command(minigpt, doctor, text_file):
    outcome = doctor()
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert any(line.startswith("  ok  causality: a later token does not change") for line in lines)
    assert "  ok  repeatability: the same step twice is bit-exact" in lines
    assert any("tokens/s" in line for line in lines)
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        assert lines[-3] == "no CUDA and no MPS on this machine: a run will use the CPU"
    assert re.search(r"time: 20 steps take about \d+ s,", outcome.out)
    table = minigpt("baselines", "--data.path", text_file).out.splitlines()[1:]
    baselines = {row[0]: float(row[1]) for row in map(str.split, table)}
    values = ", ".join(f"{name} {baselines[name]:.2f}" for name in ("bigram", "5-gram", "xz"))
    untrained = math.log(len(set(text_file.read_text("utf-8"))))
    expected = f"an untrained model has about {untrained:.2f} nats/token; a trained one should be below {values}"
    assert lines[-2] == f"loss: {expected} nats/char"
    assert lines[-1] == "all checks passed"
    assert list(Path.cwd().iterdir()) == []
