"""A run's directory: which one is chosen, which are refused, the lock, and forks."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from conftest import Outcome
from filelock import FileLock, SoftFileLease
from support.runs import SMALL, at_micro_batch, differences, interrupt, summary, train_small

from minigpt_pl.checkpoint.run_dir import RunDir, resolve_run_dir
from minigpt_pl.runtime.errors import UserError

Call = Callable[..., Outcome]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 16 steps, the last of which is the best."""
    return train_small(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return shutil.copytree(trained, tmp_path / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(minigpt: Call, *args: object) -> str:
    """The message of a `fit` that must fail."""
    outcome = minigpt("fit", *args)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    return outcome.err


def test_a_directory_that_holds_a_run_is_left_alone(minigpt: Call, run: Path, text_file: Path) -> None:
    before = files(run)
    for missing in ("", "best.ckpt"):
        if missing:
            (run / missing).unlink()
            del before[missing]
        message = refused(minigpt, *SMALL, "--data.path", text_file, "--run_dir", run)
        problem = f"error: --run_dir {run}: the directory holds a run"
        assert message == f"{problem}; resume it with --ckpt_path last, or use another --run_dir\n"
        assert files(run) == before


def test_a_second_process_is_refused_while_the_first_one_runs(minigpt: Call, tmp_path: Path, text_file: Path) -> None:
    run = tmp_path / "run"
    messages = []

    def second_fit() -> None:  # only its lock: one process cannot train twice at a time
        with pytest.raises(UserError) as refusal, RunDir(run, resuming=True).lock():
            pass
        messages.append(str(refusal.value))

    with at_micro_batch(3, second_fit):
        assert minigpt("fit", *SMALL, "--data.path", text_file, "--run_dir", run).status == 0
    problem = f"run_dir {run}: another process trains in it"
    assert messages == [f"{problem}; wait for it to end, or use another --run_dir"]
    assert not (run / ".lock").exists()


def test_the_lock_file_of_a_dead_process_does_not_matter(minigpt: Call, run: Path) -> None:
    with FileLock(run / ".lock"):
        assert "another process trains in it" in refused(minigpt, "--run_dir", run, "--ckpt_path", "last")
    (run / ".lock").write_text("left by a dead process")
    assert minigpt("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 17).status == 0


def lease_of_another_host(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease as a host of another name leaves it. Here leases end after a second."""
    monkeypatch.setattr("minigpt_pl.checkpoint.run_dir.LEASE_SECONDS", 1.0)
    with SoftFileLease(path, lease_duration=1.0):
        content, times = re.subn(r"(?m)^host=.*$", "host=elsewhere", path.read_text())
    assert times == 1
    path.write_text(content)


def test_on_a_file_system_that_shares_no_locks_a_lease_keeps_other_hosts_out(
    minigpt: Call, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it is refreshed. That of a host which has died ends, and the run resumes."""
    lease_of_another_host(run / ".lease", monkeypatch)
    resume, has_died = ("--run_dir", run, "--ckpt_path", "last"), Event()

    def refresh() -> None:
        while not has_died.wait(0.1):
            os.utime(run / ".lease")

    other_host = Thread(target=refresh)
    other_host.start()
    try:
        assert "another process trains in it" in refused(minigpt, *resume)
    finally:
        has_died.set()
        other_host.join()
    assert minigpt("fit", *resume, "--trainer.max_steps", 17).status == 0
    assert not list(run.glob(".l*"))


def test_a_process_that_has_lost_its_lease_ends_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was suspended, and another host has taken the directory over."""
    lease_of_another_host(tmp_path / "other", monkeypatch)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom minigpt_pl.checkpoint import run_dir\n"
        "run_dir.LEASE_SECONDS, run = 1.0, Path(sys.argv[1], 'run')\n"
        "with run_dir.RunDir(run, True).lock():\n"
        "    Path(sys.argv[1], 'other').replace(run / '.lease')\n    time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    problem = "another host has taken it over while this process stood still; use another --run_dir"
    assert (done.returncode, done.stderr) == (2, f"error: run_dir {tmp_path / 'run'}: {problem}\n")
    assert "elsewhere" in (tmp_path / "run" / ".lease").read_text()


def test_a_run_that_another_process_started_meanwhile_is_not_overwritten(
    minigpt: Call, trained: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory was free when the command was parsed, and holds a run when it is locked."""
    run = tmp_path / "run"
    monkeypatch.setattr(
        "minigpt_pl.checkpoint.run_dir.FileLock", lambda path: (shutil.copytree(trained, run), FileLock(path))[1]
    )
    assert "holds a run" in refused(minigpt, *SMALL, "--data.path", text_file, "--run_dir", run)
    assert files(run) == files(trained)


def test_files_of_a_start_that_failed_are_moved_aside(minigpt: Call, tmp_path: Path, text_file: Path) -> None:
    run = tmp_path / "run"
    (run / "wandb").mkdir(parents=True)
    (run / "metrics.csv").write_text("old")
    (run / "last.ckpt.writing").write_text("half")
    (run / "notes.md").write_text("mine")
    outcome = minigpt("fit", *SMALL, "--data.path", text_file, "--run_dir", run)
    assert outcome.status == 0
    (aside,) = run.glob("aside-*")
    assert f"{run} had files of a start that failed early: moved to {aside}\n" in outcome.err
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.csv", "wandb"]
    assert sorted(path.name for path in run.iterdir()) == sorted(
        [aside.name, "best.ckpt", "config.yaml", "last.ckpt", "metrics.csv", "notes.md", "summary.json"]
    )


def test_a_failed_start_leaves_no_directory(minigpt: Call, tmp_path: Path, text_file: Path) -> None:
    """After the first checkpoint an error leaves the run; before it, nothing."""
    run = tmp_path / "new" / "run"
    with pytest.raises(ZeroDivisionError), at_micro_batch(1, lambda: 1 / 0):
        minigpt("fit", *SMALL, "--data.path", text_file, "--run_dir", run)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "last.ckpt", "metrics.csv", "summary.json"]
    assert summary(run)["stop_reason"] == "error"
    args = ("fit", *SMALL, "--data.path", text_file, "--run_dir", tmp_path / "other" / "run")
    assert minigpt(*args, "--trainer.devices", 3, "--trainer.strategy", "no_such").status == 2
    assert not (tmp_path / "other").exists()


def test_a_fork_needs_a_directory_and_names_its_parent(minigpt: Call, run: Path, tmp_path: Path) -> None:
    before = files(run)
    best = run / "best.ckpt"
    assert f"--ckpt_path {best} --run_dir NEW" in refused(minigpt, "--run_dir", run, "--ckpt_path", "best")
    assert "--run_dir NEW" in refused(minigpt, "--ckpt_path", best)
    assert "holds a run" in refused(minigpt, "--ckpt_path", best, "--run_dir", run)
    fork = tmp_path / "fork"
    assert minigpt("fit", "--ckpt_path", best, "--run_dir", fork, "--trainer.max_steps", 20).status == 0
    result = summary(fork)
    assert (result["parent"], result["parent_step"], result["total_steps"]) == (str(best), 16, 20)
    assert result["tokens_seen"] == 20 * 4 * 16
    assert summary(run)["parent"] is None
    assert files(run) == before
    first_row = (fork / "metrics.csv").read_text("utf-8").splitlines()[1]
    assert first_row.startswith("18,train")
    ids = [torch.load(folder / "last.ckpt", weights_only=True)["wandb_id"] for folder in (run, fork)]
    assert ids[0] != ids[1]


def test_a_fork_without_changes_equals_the_run(minigpt: Call, tmp_path: Path, text_file: Path) -> None:
    """From the best of 10 steps to 16: the weights equal those of a run of 16 steps."""
    args = ("fit", *SMALL, "--data.path", text_file, "--model.lr_schedule", "constant")
    assert minigpt(*args, "--run_dir", tmp_path / "straight").status == 0
    assert minigpt(*args, "--run_dir", tmp_path / "short", "--trainer.max_steps", 10).status == 0
    source = ("fit", "--ckpt_path", tmp_path / "short" / "best.ckpt", "--trainer.max_steps", 16)
    with at_micro_batch(14, interrupt):
        assert minigpt(*source, "--run_dir", tmp_path / "fork").status == 130
    assert minigpt("fit", "--ckpt_path", tmp_path / "fork" / "last.ckpt").status == 0
    assert summary(tmp_path / "fork")["parent"] == str(tmp_path / "short" / "best.ckpt")
    lines = differences(tmp_path / "straight", tmp_path / "fork")
    assert [line for line in lines if line.startswith(("last/state", "last/opt", "best/state", "best/opt"))] == []


def test_last_ckpt_in_another_directory_starts_a_fork(tmp_path: Path) -> None:
    last = tmp_path / "run" / "last.ckpt"
    assert resolve_run_dir("", last, "ModernLM") == resolve_run_dir(str(last.parent), last, "ModernLM")
    assert resolve_run_dir("", last, "ModernLM") == RunDir(last.parent, resuming=True)
    assert resolve_run_dir(str(tmp_path / "new"), last, "ModernLM") == RunDir(tmp_path / "new", resuming=False)


def test_processes_that_lightning_starts_use_the_directory_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT_RUN_DIR", "")  # restored afterwards
    first = resolve_run_dir("", None, "ModernLM")
    assert first.path.name.endswith("-ModernLM")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_run_dir("", None, "OtherTime") == first
    monkeypatch.delenv("MINIGPT_RUN_DIR")
    with pytest.raises(UserError, match="each with its own clock; use --run_dir DIR"):
        resolve_run_dir("", None, "ModernLM")


def test_last_and_best_need_a_directory(minigpt: Call, tmp_path: Path) -> None:
    assert "--ckpt_path last: it needs --run_dir" in refused(minigpt, "--ckpt_path", "last")
    assert f"there is no {tmp_path / 'last.ckpt'}" in refused(minigpt, "--run_dir", tmp_path, "--ckpt_path", "last")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_run_dir_gets_a_directory_by_time_and_model(
    minigpt: Call, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert minigpt("fit", *SMALL, "--data.path", text_file).status == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-ModernLM")
    assert (run / "last.ckpt").exists()
