"""A value in a file means what it means on the command line, and what --print_config prints can be given back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, Outcome

from minigpt_pl.cli.options import flatten, option_name

MiniGPT = Callable[..., Outcome]
VALUES = [
    ("trainer.gradient_clip_val", "None", None), ("wandb", "None", None), ("wandb.name", "None", None),
    ("wandb.name", "010", "010"), ("wandb.group", "123", "123"), ("wandb.name", "yes", "yes"),
    ("wandb.name", "12:30:00", "12:30:00"), ("seed_everything", "010", 10), ("seed_everything", "08", 8),
    ("trainer.max_steps", "010", 10), ("trainer.max_steps", "0x10", "refused"), ("data.eval_every", "1:30", "refused"),
    ("trainer.max_time", "10:00:00:00", "10:00:00:00"), ("trainer.max_time", "00:00:00:30", "00:00:00:30"),
    ("data.path", "010", "010"), ("model.lr", "1e-3", 0.001), ("data.bpe_across_lines", "yes", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), VALUES)
def test_a_value_in_a_file_is_read_as_on_the_command_line(
    name: str, text: str, expected: Any, minigpt: MiniGPT, tmp_path: Path
) -> None:
    nested = text
    for key in reversed(name.split(".")):
        nested = f"{{{key}: {nested}}}" if nested != text or ":" not in text else f"{{{key}:  {text}}}"
    (tmp_path / "file.yaml").write_text(nested.replace("{", "", 1)[:-1] if "." not in name else nested, "utf-8")
    for given in ((f"--{name}={text}",), ("-c", tmp_path / "file.yaml")):
        outcome = minigpt("fit", "-c", "smoke", *given, "--print_config")
        if expected == "refused":
            assert outcome.status == 2
            continue
        assert outcome.status == 0, outcome.err
        found = {option_name(key): value for key, value in flatten(yaml.safe_load(outcome.out))}
        assert found[name] == expected


def test_what_print_config_prints_can_be_given_back(minigpt: MiniGPT, tmp_path: Path) -> None:
    small = ("--model.n_embd", 8, "--model.block_size", 16, "--trainer.max_steps", 2)
    assert minigpt("fit", *TINY, *small, "--run_dir", tmp_path / "run").status == 0
    start = ("--ckpt_path", tmp_path / "run" / "best.ckpt")
    for command in ("validate", "predict"):
        printed = minigpt(command, *start, "--print_config")
        (tmp_path / "printed.yaml").write_text(printed.out, "utf-8")
        again = minigpt(command, "-c", tmp_path / "printed.yaml", *start)
        assert (again.status, again.err) == (0, "")
        assert minigpt(command, "-c", tmp_path / "run" / "config.yaml", *start).out == again.out
    printed = minigpt("fit", *TINY, *small, "--run_dir", tmp_path / "second", "--print_config")
    (tmp_path / "printed.yaml").write_text(printed.out, "utf-8")
    assert minigpt("fit", "-c", tmp_path / "printed.yaml", "--run_dir", tmp_path / "second").status == 0
