"""Signals to real processes: nothing is lost or unfinished, and a resumed run ends like one that was never stopped."""

import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from support.processes import PLACES, Landed, Process, draw, faults
from support.runs import SMALL, differences

from minigpt_pl.data.datasets import StepSampler

Call = Callable[..., Outcome]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Any, ...], Path]:
    """Options of a fit, and the directory of that run without a stop."""
    from minigpt_pl.__main__ import main

    home = tmp_path_factory.mktemp("expected")
    (home / "text.txt").write_text(
        "".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(200)), "utf-8"
    )
    options = ("fit", *SMALL, "--data.path", home / "text.txt")
    assert main([str(word) for word in (*options, "--run_dir", home / "run")]) == 0
    return options, home / "run"


def resume(minigpt: Call, options: tuple[Any, ...], run_dir: Path) -> None:
    """Resumes what a stopped process has left, as a user would."""
    if (run_dir / "last.ckpt").exists():
        outcome = minigpt("fit", "--run_dir", run_dir, "--ckpt_path", "last")
    else:
        outcome = minigpt(*options, "--run_dir", run_dir)
    assert outcome.status == 0, outcome.err


def same(straight: Path, run_dir: Path) -> list[str]:
    """Differences between a run and the one without a stop, except the number of workers."""
    found = [line for line in differences(straight, run_dir) if "num_workers" not in line]
    return [line for line in found if not line.startswith("config.yaml")]


CASES = {  # directory: (place, step, signals, options)
    "start": ("start", 0, ["SIGTERM"], ()),
    "step": ("step", 7, ["group SIGINT"], ("--data.num_workers", 2)),
    "write": ("write", 4, ["SIGKILL"], ()),
    "twice": ("step", 6, ["SIGINT", "SIGINT"], ()),
}


@pytest.mark.e2e
def test_real_processes_are_stopped_and_resumed(minigpt: Call, expected: Any, tmp_path: Path) -> None:
    """At start-up, by Ctrl-C to the group with workers in a step, by SIGKILL in a write, and by a second Ctrl-C."""
    options, straight = expected

    def strike(name: str) -> Landed:
        place, step, signals, more = CASES[name]
        process = Process((*options, *more), tmp_path / name)
        if place == "start":
            time.sleep(2)  # torch is being imported
        process.wait_for(place, step)
        for first in signals[:-1]:
            process.popen.send_signal(signal.Signals[first])
        return process.send(signals[-1])

    with ThreadPoolExecutor() as threads:
        struck = dict(zip(CASES, threads.map(strike, CASES), strict=True))
    for name, landed in struck.items():
        print(landed)
        assert landed.place == CASES[name][0]
        assert faults(landed, tmp_path / name) == []
    assert not (tmp_path / "start").exists()
    assert (tmp_path / "write" / "last.ckpt.writing").exists()
    assert struck["step"].err.count("stopping after this step") == 1
    assert f"continue with minigpt fit --run_dir {tmp_path / 'step'} --ckpt_path last" in struck["step"].err
    for name in ("step", "write", "twice"):
        resume(minigpt, options, tmp_path / name)
        assert same(straight, tmp_path / name) == []
        assert not list((tmp_path / name).glob("*.writing"))


@pytest.mark.slow
def test_no_signal_at_any_moment_damages_a_run(
    minigpt: Call, expected: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sixty kills and more, until each place was struck eight times; says where each landed."""
    options, straight = expected
    struck = dict.fromkeys(PLACES, 0)
    number = 0
    while min(struck.values()) < 8 or number < 60:
        how, place, step, delay = draw(number)
        run_dir = tmp_path / str(number)
        workers = ("--data.num_workers", 2) if how == "group SIGINT" else ()
        process = Process((*options, *workers), run_dir)
        process.wait_for(place, step)
        time.sleep(delay)
        landed = process.send(how)
        struck[landed.place] += 1
        with capfd.disabled():
            print(f"{number:3} {landed}", flush=True)
        assert faults(landed, run_dir) == []
        resume(minigpt, options, run_dir)
        assert same(straight, run_dir) == []
        shutil.rmtree(run_dir)
        number += 1
        assert number < 200, struck
    with capfd.disabled():
        print(struck)


@pytest.mark.slow
def test_the_harness_finds_a_checkpoint_written_in_place(expected: Any, tmp_path: Path) -> None:
    """With a plain write in place of the atomic one, SIGKILL in it leaves a broken last.ckpt."""
    process = Process(expected[0], tmp_path / "run", FAULT="torn")
    process.wait_for("write", 4)
    landed = process.send("SIGKILL")
    assert landed.place == "write"
    (fault,) = faults(landed, tmp_path / "run")
    assert "last.ckpt: the file is not a complete checkpoint" in fault


@pytest.mark.slow
def test_the_harness_finds_a_resume_that_skips_a_batch(
    minigpt: Call, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, straight = expected
    process = Process(options, tmp_path / "run")
    process.wait_for("step", 6)
    assert faults(process.send("SIGTERM"), tmp_path / "run") == []
    monkeypatch.setattr(StepSampler, "__iter__", lambda self: iter(range(self.start() + (self.start() > 0), 100)))
    resume(minigpt, options, tmp_path / "run")
    assert any(line.startswith("last/state_dict") for line in same(straight, tmp_path / "run"))
