"""docs/python.md: its code runs from top to bottom, as a reader would run it."""

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, TINY

from minigpt_pl.__main__ import main

PAGE = (PROJECT / "docs" / "python.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*", "ignore:Checkpoint directory .* exists")
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_module.py").write_text("\n".join(BLOCKS), "utf-8")  # jsonargparse reads the source of a class
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = vars(import_module("my_module"))
    assert (tmp_path / "runs" / "exact" / "best.ckpt").is_file()
    assert names["trainer"].global_step == 20
    own = names["MyData"](path="data/input.txt", block_size=64, batch_size=16, eval_every=100)
    names["Trainer"](max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False).fit(names["calm"], own)
    options = ["--data.path", "data/input.txt", "--data.batch_size", "4", "--data.eval_every", "5"]
    options += ["--model.dropout", "0", "--model.lr", "0.01", "--model.weight_decay", "0", "--model.block_size", "32"]
    options += ["--trainer.max_steps", "2", "--trainer.logger", "false", "--trainer.limit_val_batches", "1"]
    monkeypatch.setattr("sys.argv", ["page.py"])  # else Lightning warns of two command lines
    names["main"](["fit", *options])
    for command in re.findall(r"^minigpt (.*my_module.*)$", PAGE, flags=re.MULTILINE):
        args = shlex.split(command, comments=True)
        small = [*TINY, "--trainer.max_steps", "2"] if "--run_dir" in args and "last" not in args else []
        assert main([args[0], *small, *args[1:]]) == 0, command
