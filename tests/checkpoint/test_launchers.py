"""The run directory when several processes are started: which process is the first, and when --run_dir is required."""

from pathlib import Path

import pytest

from minigpt_pl.checkpoint.run_dir import resolve_run_dir
from minigpt_pl.runtime.errors import UserError, is_rank_zero


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK", "MINIGPT_RUN_DIR", "MINIGPT_RESUMING"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone as well
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK"])
def test_each_launcher_names_the_first_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun, SLURM and Lightning on a second node each use their own variable for the number of the process."""
    assert is_rank_zero()
    monkeypatch.setenv(name, "1")
    assert not is_rank_zero()
    assert resolve_run_dir("runs/x", None, "ModernLM") == (Path("runs/x"), False)
    with pytest.raises(UserError, match="--run_dir"):
        resolve_run_dir("", None, "ModernLM")


@pytest.mark.parametrize(("mark", "count"), [("TORCHELASTIC_RUN_ID", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_several_processes_need_run_dir(mark: str, count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process says so too: it alone prints, and the others have ended."""
    monkeypatch.setenv(mark, "0")
    monkeypatch.setenv(count, "2")
    assert is_rank_zero()
    with pytest.raises(UserError, match="--run_dir"):
        resolve_run_dir("", None, "ModernLM")
    assert resolve_run_dir("runs/x", None, "ModernLM") == (Path("runs/x"), False)
    monkeypatch.setenv(count, "1")
    assert resolve_run_dir("", None, "ModernLM")[0].parent == Path("runs")
