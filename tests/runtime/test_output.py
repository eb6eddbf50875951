"""What a command prints where the output is full, closed, or in an old encoding; and where there is no home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.paths import NOWHERE, cache_dir, expand_home, home_for

FIT = (
    "fit", "-c", "smoke", "--wandb", "null", "--samples", "null", "--model.n_embd", "16", "--model.block_size", "16",
    "--data.batch_size", "4", "--data.eval_every", "2", "--trainer.max_steps", "2", "--model.n_layer", "1",
    "--trainer.enable_progress_bar", "false", "--data.path", "text.txt", "--run_dir", "run",
)  # fmt: skip


def command(folder: Path, stdout: object, **env: str) -> subprocess.CompletedProcess[str]:
    (folder / "text.txt").write_text("ἡ θάλασσα ἔρχεται 🌊.\n" * 100, "utf-8")
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", **env}
    words = [sys.executable, "-m", "minigpt_pl", *FIT]
    return subprocess.run(
        words, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300
    )  # type: ignore[call-overload, no-any-return]


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
