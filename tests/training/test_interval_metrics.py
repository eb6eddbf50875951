"""What is reported for an interval covers all of it: every step, micro-batch and device; docs/metrics.md says so."""

import re
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import pytest
import torch
from conftest import PROJECT
from support.runs import rows_of, train_small

from minigpt_pl.models.moe import MoE
from minigpt_pl.training.metrics import Throughput
from minigpt_pl.training.monitors import ALWAYS, BY_EVAL_MODE, EXPERTS
from minigpt_pl.training.running_means import RunningMeans

MOE = ("--model.n_layer", 1, "--model.n_experts", 4, "--model.moe_top_k", 1, "--trainer.accumulate_grad_batches", 2)


def test_the_load_of_experts_is_that_of_all_micro_batches_since_the_last_log(tmp_path: Path) -> None:
    shares, original = [], MoE.route

    def route(self: MoE, x_NC: torch.Tensor) -> object:
        found = original(self, x_NC)
        if torch.is_grad_enabled() and self.last_routing is not None:
            shares.append(self.last_routing[0])
        return found

    with patch.object(MoE, "route", route):
        run = train_small(tmp_path, *MOE)
    rows = {int(row["step"]): row for row in rows_of(run) if row["split"] == "train"}
    for start, step in ((0, 3), (3, 6), (15, 16)):
        expected = torch.stack(shares[2 * start : 2 * step]).mean(0).tolist()
        assert [float(rows[step][f"moe/load_0_{expert}"]) for expert in range(4)] == pytest.approx(expected, abs=1e-6)


def test_the_line_of_an_evaluation_shows_the_mean_loss_since_the_last_row(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows come every 3 steps, evaluations every 5; a step has two micro-batches."""
    losses, original = [], RunningMeans.add_losses

    def add_losses(self: RunningMeans, loss: torch.Tensor, aux_loss: torch.Tensor) -> None:
        losses.append(loss.item())
        original(self, loss, aux_loss)

    with patch.object(RunningMeans, "add_losses", add_losses):
        train_small(tmp_path, "--trainer.enable_progress_bar", "true", "--trainer.accumulate_grad_batches", 2)
    lines = re.findall(r"step +(\d+)/16  train/loss ([\d.]+)", capfd.readouterr().out)
    means = {step: mean(losses[2 * start : 2 * step]) for start, step in ((3, 5), (9, 10), (12, 15), (15, 16))}
    assert lines == [(str(step), f"{value:.4f}") for step, value in means.items()]


def test_a_save_between_two_logs_does_not_shorten_the_interval_of_the_speed() -> None:
    clock = [0.0]
    with patch("time.perf_counter", lambda: clock[0]):
        clock[0], throughput = 1.0, Throughput()
        throughput.resume()
        for step in range(1, 16):
            clock[0] += 1.0 if step <= 13 else 5.0
            throughput.count_step(100 * step)
            if step == 13:
                throughput.update(100 * step)  # as a checkpoint does
        assert throughput.log(1500) == pytest.approx(1000 / 18)
        assert (throughput.tokens, throughput.seconds) == (1000, 18)


def test_the_page_has_every_metric() -> None:
    page = (PROJECT / "docs" / "metrics.md").read_text("utf-8")
    documented = set(re.findall(r"`([\w/]+)`", page))
    assert documented >= {*ALWAYS, *EXPERTS, *BY_EVAL_MODE["both"], *BY_EVAL_MODE["sampled"], "perf/tokens_per_s"}
