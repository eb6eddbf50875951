"""README keeps its word: every command in it runs to completion, in order, with only sizes reduced."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, Outcome

README = (PROJECT / "README.md").read_text("utf-8")
CI = (PROJECT / ".ci" / "run").read_text("utf-8")
TESTS = "python -m pytest -n 2 --dist loadfile"
INSTALL = ("python -m venv .venv", ". .venv/bin/activate", 'pip install -e ".[dev]"')
SMALL_FIT = (
    "--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--model.block_size", "16",
    "--data.batch_size", "2", "--data.eval_every", "4", "--data.max_eval_tokens", "64", "--trainer.max_steps",
)  # fmt: skip
SMALL = {
    "predict": ("--sample.max_new_tokens", "5"),
    "validate": ("--data.max_eval_tokens", "64"),
    "doctor": ("-c", "smoke"),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]


def reduced(words: list[str]) -> list[str]:
    """A command with its sizes made small, and nothing else."""
    if words[0] != "fit" or "--help" in words:
        return [*words, *SMALL.get(words[0], ())]
    if "--ckpt_path" in words:  # goes on where another one ends
        return [*words, *SMALL_FIT, "8" if "runs/branch" in words else "6"]  # a branch goes beyond its parent
    text = () if "runs/first" in words else ("--data.path", "my.txt")
    return [*words, *SMALL_FIT, "4", *text]


def test_every_command_and_the_python_in_it_run(
    minigpt: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (PROJECT / "data" / "input.txt").read_text("utf-8")
    (tmp_path / "my.txt").write_text(text[:5000], "utf-8")
    ran = []
    for command in COMMANDS:
        if command in (*INSTALL, TESTS):
            continue
        words = shlex.split(command, comments=True)
        assert words[:2] == ["python", "main.py"], f"nothing tests {command}"
        done = minigpt(*reduced(words[2:]))
        assert done.status == 0, f"{command}: {done.err}"
        ran.append(words[2])
    assert {"fit", "validate", "test", "predict"} <= set(ran)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_installation_and_tests_are_what_ci_runs() -> None:
    assert set(INSTALL) <= set(COMMANDS)
    assert TESTS in COMMANDS
    lines = CI.splitlines()
    assert TESTS in lines
    assert 'pip install --quiet -e ".[dev]"' in lines


def test_it_is_short_and_names_what_there_is() -> None:
    assert len(README.splitlines()) < 200
    tree = README[README.index("## The files") :]
    for path in [*PROJECT.glob("minigpt_pl/[a-z]*.py"), *PROJECT.glob("configs/[a-z]*.yaml")]:
        assert re.search(rf"\b{path.stem}\b", tree), f"{path.name} is not in the list of files"
    for path in PROJECT.glob("configs/journey/*.yaml"):
        assert path.stem in README
