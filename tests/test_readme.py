"""README is true: its commands run in order with smaller sizes, and it names what there is."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, Outcome

README = (PROJECT / "README.md").read_text("utf-8")
MAX_LINES = 170
TESTS = "python -m pytest -n 2 --dist loadfile"
INSTALL = ("python -m venv .venv", ". .venv/bin/activate", 'pip install -e ".[dev]"')
SMALL_FIT = (
    "--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "16", "--model.block_size", "16",
    "--data.batch_size", "2", "--data.eval_every", "4", "--data.max_eval_tokens", "64",
    "--samples.max_new_tokens", "5", "--trainer.max_steps",
)  # fmt: skip
SMALL = {
    "predict": ("--sample.max_new_tokens", "5"),
    "validate": ("--data.max_eval_tokens", "64"),
    "test": ("--data.max_eval_tokens", "64"),
    "doctor": ("-c", "smoke"),
}
TEXT = "my.txt"


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line.split("  #")[0].rstrip() for block in code_blocks("bash") for line in block.splitlines()]


def shrink(args: list[str]) -> list[str]:
    """The arguments of a command with smaller sizes and a smaller text; W&B starts for the first fit only."""
    if args[0] != "fit" or "--help" in args:
        return [*args, *SMALL.get(args[0], ())]
    if args == ["fit", "--run_dir", "runs/first"]:
        return [*args, "--data.path", TEXT, *SMALL_FIT, "4"]
    text = () if "--ckpt_path" in args else ("--data.path", TEXT)
    steps = {"runs/first": "6", "runs/fork": "8"}.get(args[args.index("--run_dir") + 1], "4")
    return [
        *args,
        "--wandb",
        "null",
        *text,
        *SMALL_FIT,
        steps,
    ]  # resumed, a run trains longer; a fork trains longer still


@pytest.mark.e2e
def test_every_command_and_the_python_block_run(
    minigpt: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(TEXT).write_text((PROJECT / "data" / "input.txt").read_text("utf-8")[:5000], "utf-8")
    commands = set()
    for line in COMMANDS:
        if line in (*INSTALL, TESTS):
            continue
        program, file, *args = shlex.split(line)
        assert (program, file) == ("python", "main.py"), f"no test runs {line}"
        result = minigpt(*shrink(args))
        assert result.status == 0, f"{line}: {result.err}"
        commands.add(args[0])
    assert {"fit", "validate", "test", "predict"} <= commands
    for block in code_blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_ci_installs_and_tests_as_readme_says() -> None:
    assert {*INSTALL, TESTS} <= set(COMMANDS)
    ci_lines = (PROJECT / ".ci" / "run").read_text("utf-8").splitlines()
    assert {TESTS, 'pip install --quiet -e ".[dev]"'} <= set(ci_lines)


def test_it_is_short_and_names_every_room_and_config() -> None:
    assert len(README.splitlines()) <= MAX_LINES
    rooms = {path.parent.name for path in PROJECT.glob("minigpt_pl/*/__init__.py")}
    assert set(re.findall(r"^(\w+)/ ", README, re.MULTILINE)) == rooms
    for path in PROJECT.glob("configs/[a-z]*.yaml"):
        assert re.search(rf"\b{path.stem}\b", README), path.name
    journey = (PROJECT / "docs" / "journey.md").read_text("utf-8")
    for path in PROJECT.glob("configs/journey/*.yaml"):
        assert path.stem in README + journey, path.name
