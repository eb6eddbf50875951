"""What a file on the command line means: a text or options, and of the options those for the command that runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, Outcome

from minigpt_pl.cli.options import flatten, option_name

MiniGPT = Callable[..., Outcome]


@pytest.fixture
def here(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with text.txt."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolved(minigpt: MiniGPT, *args: object) -> dict[str, Any]:
    """The resolved configuration by dotted names, from --print_config."""
    outcome = minigpt(*args, "--print_config")
    assert outcome.status == 0, outcome.err
    return {option_name(name): value for name, value in flatten(yaml.safe_load(outcome.out))}


def test_data_takes_a_text_or_a_file_of_options(minigpt: MiniGPT, here: Path) -> None:
    default = resolved(minigpt, "fit")
    Path("title.txt").write_text("Title: the sea\n", "utf-8")  # YAML, but of no options
    Path("long").write_text("batch_size: 5\n" * 9000, "utf-8")  # it would take long to read as YAML
    for args, path in (
        (("--data", "text.txt"), "text.txt"),
        (("--data=title.txt",), "title.txt"),
        (("--data", "long"), "long"),
    ):
        config = resolved(minigpt, "fit", *args)
        assert config == default | {"data.path": path}
    for name in ("options.yaml", "options"):
        Path(name).write_text("{batch_size: 5, path: text.txt}", "utf-8")
        config = resolved(minigpt, "fit", "--data", name)
        assert config == default | {"data.path": "text.txt", "data.batch_size": 5}
    assert resolved(minigpt, "fit", "--data", '{"batch_size": 5}')["data.batch_size"] == 5
    Path("prose.yaml").write_text("the sea", "utf-8")
    assert "--data prose.yaml: the file is plain text" in minigpt("fit", "--data", "prose.yaml").err
    Path("short").write_text("the sea")
    assert "--data.path short: it is too short" in minigpt("fit", "--data", "short").err


def test_a_section_holds_for_its_command_and_wins_over_what_all_have(minigpt: MiniGPT, here: Path) -> None:
    content = {
        "seed_everything": 5,
        "data": {"batch_size": 3, "eval_every": 7},
        "fit": {"data": {"batch_size": 4}, "trainer": {"max_steps": 9}},
        "validate": {"data": {"batch_size": 11}, "no_such_option": 1},
        "predict": None,
    }
    Path("both.yaml").write_text(yaml.safe_dump(content), "utf-8")
    config = resolved(minigpt, "fit", "-c", "both.yaml")
    names = ("seed_everything", "data.batch_size", "data.eval_every", "trainer.max_steps")
    assert [config[name] for name in names] == [5, 4, 7, 9]
    assert resolved(minigpt, "fit", "-c", "both.yaml", "--data.batch_size", 6)["data.batch_size"] == 6
    Path("wrong.yaml").write_text("fit: {data: {bath_size: 4}}", "utf-8")
    outcome = minigpt("fit", "-c", "wrong.yaml")
    assert outcome.err.startswith("error: data.bath_size 4 in wrong.yaml: there is no such option; did you mean")
    Path("number.yaml").write_text("fit: 4", "utf-8")
    assert minigpt("fit", "-c", "number.yaml").err.startswith("error: fit 4 in number.yaml: there is no such option")


def test_a_runs_config_works_for_every_command_and_keeps_its_strength(minigpt: MiniGPT, here: Path) -> None:
    split = ("--data.train_frac", 0.8, "--data.test_frac", 0.1)
    assert minigpt("fit", *TINY, "--data", "text.txt", "--run_dir", "run", *split).status == 0
    start = ("--run_dir", "run", "--ckpt_path", "best")
    for command in ("validate", "test", "predict"):
        plain = minigpt(command, *start)
        outcome = minigpt(command, *start, "-c", "run/config.yaml")
        assert (outcome.status, outcome.err, outcome.out) == (0, "", plain.out)
    Path("mine.yaml").write_text("{data: {batch_size: 3}, trainer: {max_steps: 5, devices: 1}, wandb: {tags: [a]}}")
    config = resolved(minigpt, "validate", *start, "-c", "mine.yaml")
    assert (config["data.batch_size"], config["trainer.devices"], config["data.path"]) == (3, 1, "text.txt")
    assert not [name for name in config if name.startswith("wandb") or name == "trainer.max_steps"]
    refused = minigpt("validate", *start, "-c", "mine.yaml", "--trainer.max_steps", 5)
    assert refused.err == "error: --trainer.max_steps 5: only fit has this option; leave it out\n"
    Path("wrong.yaml").write_text("trainer: {max_stepps: 5}", "utf-8")
    assert (
        "trainer.max_stepps 5 in wrong.yaml: there is no such option" in minigpt("test", *start, "-c", "wrong.yaml").err
    )
