"""What a command prints where the output is full, closed, or in an old encoding; and where there is no home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT
from support.runs import at_micro_batch, interrupt, summary

from minigpt_pl.__main__ import main
from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.paths import NOWHERE, cache_dir, expand_home, home_for

FIT = (
    "fit", "-c", "smoke", "--wandb", "null", "--samples.max_new_tokens", "99", "--model.n_embd", "16",
    "--model.block_size", "16", "--data.batch_size", "4", "--data.eval_every", "2", "--trainer.max_steps", "2",
    "--model.n_layer", "1", "--trainer.enable_progress_bar", "false", "--data.path", "text.txt", "--run_dir", "run",
)  # fmt: skip


def command(folder: Path, stdout: object, *, shell: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """`minigpt fit`; `shell` redirects its output as in a terminal: "2>/dev/full"."""
    (folder / "text.txt").write_text("ἡ θάλασσα ἔρχεται 🌊.\n" * 100, "utf-8")
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", **env}
    words = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "minigpt_pl", *FIT]
    return subprocess.run(
        words, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300
    )  # type: ignore[call-overload, no-any-return]


@pytest.mark.e2e
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has this device")
@pytest.mark.parametrize("shell", [">&- 2>&-", "2>/dev/full"])
def test_a_run_ends_well_whoever_listens(shell: str, tmp_path: Path) -> None:
    """Nothing that is printed lands in a file of the run."""
    done = command(tmp_path, subprocess.PIPE, shell=shell)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "run" / "summary.json").exists()
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "text.txt"]


def test_a_stopped_run_keeps_its_exit_status_when_the_reader_of_a_pipe_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `minigpt fit | head`, stopped by Ctrl-C."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the sea comes in, the sea goes out.\n" * 100)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, at_micro_batch(1, interrupt):
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main([*FIT]) == 130
        monkeypatch.undo()
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 1
    assert summary(tmp_path / "run")["stop_reason"] == "interrupted"


@pytest.mark.e2e
def test_a_machine_without_a_compiler_is_found_out_before_a_run_begins(tmp_path: Path) -> None:
    (tmp_path / "compiled.yaml").write_text("model: {compile: true}")
    done = command(tmp_path, subprocess.PIPE, shell="-c compiled.yaml", CXX="/nonexistent")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch.compile fails on this machine (")
    assert done.stderr.endswith("; install a C++ compiler such as g++, or use --model.compile false\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.e2e
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has this device")
def test_a_run_whose_report_cannot_be_printed_is_finished(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = command(tmp_path, full)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("all is done, but its report could not be printed (No space left on device)\n")
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.e2e
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_a_terminal_cannot_show_is_replaced_and_files_stay_utf_8(encoding: str, tmp_path: Path) -> None:
    done = command(tmp_path, subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "A sample from best.ckpt" in done.stdout
    assert "?" in done.stdout


def test_there_is_no_cache_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_entry(*args: object) -> None:
        raise KeyError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    assert cache_dir() == NOWHERE
    assert home_for(tmp_path) == {"HOME": str(tmp_path)}
    with pytest.raises(UserError, match="run_dir ~/x: the home directory is not known"):
        expand_home("~/x", "run_dir")


def test_a_home_that_can_only_be_read_stays_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/proc")
    assert home_for(tmp_path) == {"WANDB_CACHE_DIR": str(tmp_path)}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_for(tmp_path) == {}
