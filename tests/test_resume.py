"""A run that was stopped and continued ends bit-equal to the run that never stopped."""

from collections.abc import Callable
from pathlib import Path

import pytest
from runs import SMALL, at_check, at_micro_batch, differences, interrupt

from conftest import Outcome

Call = Callable[..., Outcome]


@pytest.mark.parametrize("step", [0, 1, 3, 5, 7, 9, 10, 12, 15])
def test_resume_at_any_step(minigpt: Call, tmp_path: Path, text_file: Path, step: int) -> None:
    options = ("fit", *SMALL, "--data.path", text_file)
    assert minigpt(*options, "--run_dir", tmp_path / "straight").status == 0
    with at_micro_batch(step, interrupt):
        stopped = minigpt(*options, "--run_dir", tmp_path / "stopped")
    assert stopped.status == (130 if step else 0), stopped.err
    resumed = minigpt("fit", "--run_dir", tmp_path / "stopped", "--ckpt_path", "last")
    assert resumed.status == 0, resumed.err
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []
