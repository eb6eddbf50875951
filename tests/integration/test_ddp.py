"""Two devices: real processes under gloo. The same batches, the same evaluations, one writer, one stop."""

import csv
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from support.processes import Process, faults
from support.runs import SMALL, differences, flat, summary

from minigpt_pl.checkpoint.io import read_checkpoint

Call = Callable[..., Outcome]
TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp")
ONE = ("--trainer.devices", 1, "--trainer.strategy", "auto")


@pytest.fixture
def options(text_file: Path) -> tuple[Any, ...]:
    """A fit of 20 steps without dropout."""
    return ("fit", *SMALL, "--model.dropout", 0, "--trainer.max_steps", 20, "--data.path", text_file)


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def evals(run_dir: Path, rank: int) -> list[str]:
    """Metrics of the evaluations of one process."""
    return run_dir.with_name(f"{run_dir.name}.place.evals-{rank}").read_text("utf-8").splitlines()


def largest_difference(one: Path, two: Path) -> float:
    """The largest difference between the weights of two runs."""
    left, right = (read_checkpoint(run / "last.ckpt")["state_dict"] for run in (one, two))
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def is_gone(process: Process) -> bool:
    """Whether no process of the group is alive, a moment after the first one ended."""
    for _ in range(100):
        try:
            os.killpg(process.popen.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_rows_of_all_devices_are_the_batch_of_one() -> None:
    from minigpt_pl.data.datasets import TrainDataset

    ids = np.arange(1000)
    whole = TrainDataset(ids, 8, 12, seed=7, accumulate=2)
    for world in (2, 3, 4):
        parts = [TrainDataset(ids, 8, 12, seed=7, accumulate=2, rank=rank, world=world) for rank in range(world)]
        for i in (0, 1, 5):
            assert torch.equal(torch.cat([part[i].inputs for part in parts]), whole[i].inputs)
            assert torch.equal(torch.cat([part[i].targets for part in parts]), whole[i].targets)


@pytest.mark.e2e
def test_two_devices_stop_at_the_same_step_and_one_device_resumes(minigpt: Call, options: Any, tmp_path: Path) -> None:
    """SIGTERM reaches the first process only. Its checkpoint resumes on one device, as if that had begun the run.

    Nor does the use of the experts depend on the number of devices: rows come every 3 steps, and all devices count.
    """
    options = (*options, "-c", "moe", "--model.moe_aux_loss_coef", 0)  # each device balances its own tokens
    process = Process((*options, *TWO), tmp_path / "two")
    process.wait_for("step", 8)
    landed = process.send("SIGTERM")
    assert faults(landed, tmp_path / "two") == []
    assert is_gone(process)
    step = summary(tmp_path / "two")["total_steps"]
    assert 8 <= step <= 20
    assert summary(tmp_path / "two")["tokens_seen"] == step * 4 * 16
    assert evals(tmp_path / "two", 0) == evals(tmp_path / "two", 1)
    assert landed.err.count("stopping after this step") == landed.err.count("best val/loss") == 1
    assert "Warning" not in landed.err
    assert not list(tmp_path.glob("two/*.lock"))

    resumed = minigpt("fit", "--run_dir", tmp_path / "two", "--ckpt_path", "last", *ONE)
    assert resumed.status == 0
    assert "trainer.devices: 2 -> 1\n" in resumed.err
    assert minigpt(*options, "--run_dir", tmp_path / "one").status == 0
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-4
    for left, right in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert (left["step"], left["split"], left["tokens_seen"]) == (
            right["step"],
            right["split"],
            right["tokens_seen"],
        )
        for name in ("train/loss", "val/loss", "train/grad_norm"):
            assert float(left[name] or 0) == pytest.approx(float(right[name] or 0), abs=1e-4)
        for name in [name for name in left if name.startswith("moe/")]:
            assert float(left[name] or 0) == pytest.approx(float(right[name] or 0), abs=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), [("modern", "SIGTERM"), ("moe", "group SIGINT"), ("classic", "SIGKILL")])
def test_two_devices_resume_bit_exact(options: Any, tmp_path: Path, kind: str, how: str) -> None:
    kinds = {"modern": (), "moe": ("-c", "moe"), "classic": ("--model", "ClassicLM")}
    words = (*options, "--model.dropout", 0.1, *kinds[kind], *TWO)
    straight = Process(words, tmp_path / "straight")
    assert straight.end() == 0
    process = Process(words, tmp_path / "run")
    process.wait_for("step", 8)
    assert faults(process.send(how), tmp_path / "run") == []
    assert is_gone(process)
    assert Process(("fit", "--ckpt_path", "last"), tmp_path / "run").end() == 0
    assert differences(tmp_path / "straight", tmp_path / "run") == []
    assert evals(tmp_path / "straight", 0) == evals(tmp_path / "straight", 1)


@pytest.mark.slow
def test_two_devices_reach_the_weights_of_one(minigpt: Call, options: Any, tmp_path: Path) -> None:
    for kind, more in (("modern", ()), ("classic", ("--model", "ClassicLM", "--trainer.accumulate_grad_batches", 2))):
        assert minigpt(*options, *more, "--run_dir", tmp_path / f"{kind}-1").status == 0
        assert Process((*options, *more, *TWO), tmp_path / f"{kind}-2").end() == 0
        assert largest_difference(tmp_path / f"{kind}-1", tmp_path / f"{kind}-2") < 1e-4


@pytest.mark.slow
def test_a_run_of_one_device_resumes_with_two(minigpt: Call, options: Any, tmp_path: Path) -> None:
    assert minigpt(*options, "--run_dir", tmp_path / "one").status == 0
    assert minigpt(*options, "--run_dir", tmp_path / "two", "--trainer.max_steps", 10).status == 0
    more = Process(("fit", "--ckpt_path", "last", "--trainer.max_steps", 20, *TWO), tmp_path / "two")
    assert more.end() == 0
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-4
    steps = [[row["step"] for row in rows(tmp_path / name)] for name in ("one", "two")]
    assert steps[0] == steps[1]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [1.0, 4.0, 6.0, 7.0, 8.0, 9.0])
def test_the_first_process_ends_the_others(options: Any, tmp_path: Path, delay: float) -> None:
    process = Process((*options, *TWO), tmp_path / "run")
    time.sleep(delay)
    assert faults(process.send("SIGTERM"), tmp_path / "run") == []
    assert is_gone(process)


@pytest.mark.slow
def test_a_second_signal_ends_both_at_once(options: Any, tmp_path: Path) -> None:
    process = Process((*options, *TWO), tmp_path / "run")
    process.wait_for("step", 5)
    os.killpg(process.popen.pid, signal.SIGINT)
    assert faults(process.send("group SIGINT"), tmp_path / "run") == []
    assert is_gone(process)


@pytest.mark.slow
def test_two_devices_diverge_together(options: Any, tmp_path: Path) -> None:
    process = Process((*options, *TWO, "--model.lr", 1e30), tmp_path / "run")
    assert process.end() == 3
    assert is_gone(process)
    assert summary(tmp_path / "run")["stop_reason"] == "diverged"
    assert process.log.read_text("utf-8").count("error: ") == 1
    assert all(
        value.isfinite().all() for value in read_checkpoint(tmp_path / "run" / "last.ckpt")["state_dict"].values()
    )


@pytest.mark.slow
def test_a_user_error_is_printed_once(options: Any, tmp_path: Path) -> None:
    process = Process((*options, *TWO, "--data.batch_size", 5), tmp_path / "run")
    assert process.end() == 2
    assert is_gone(process)
    output = process.log.read_text("utf-8")
    assert output.count("error: ") == 1
    assert "data.batch_size" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_resumed_metrics_are_those_of_all_devices(options: Any, tmp_path: Path) -> None:
    """The run is stopped between two rows of metrics; the sums of each device continue."""
    assert Process((*options, *TWO), tmp_path / "straight").end() == 0
    assert Process((*options, *TWO, "--trainer.max_steps", 10), tmp_path / "run").end() == 0
    assert Process(("fit", "--ckpt_path", "last", "--trainer.max_steps", 20), tmp_path / "run").end() == 0
    columns = ("step", "split", "train/loss", "train/grad_norm", "val/loss")
    found = [
        flat([{name: row[name] for name in columns} for row in rows(tmp_path / name)]) for name in ("straight", "run")
    ]
    assert found[0] == found[1]
