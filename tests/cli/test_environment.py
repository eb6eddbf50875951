"""W&B's environment variables: they win over configs/default.yaml, and files and flags win over them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Outcome

from minigpt_pl.training.wandb_variables import HIDDEN, VARIABLES

Wandb = Callable[..., dict[str, Any] | None]


@pytest.fixture
def wandb(minigpt: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Wandb:
    """The options for W&B of a `fit` with these arguments and variables."""

    def resolve(*args: object, **variables: str) -> dict[str, Any] | None:
        with monkeypatch.context() as patch:
            for name, text in variables.items():
                patch.setenv(f"WANDB_{name}", text)
            outcome = minigpt("fit", *args, "--print_config")
        assert outcome.status == 0, outcome.err
        options: dict[str, Any] | None = yaml.safe_load(outcome.out)["wandb"]
        return options

    return resolve


def test_each_variable_sets_its_option(wandb: Wandb) -> None:
    default = wandb()
    assert default is not None
    texts = {name: f"my {name}" for name in VARIABLES if name != "offline"}
    variables = {VARIABLES[name].removeprefix("WANDB_"): text for name, text in texts.items()}
    assert wandb(**variables) == default | texts
    assert wandb(**dict.fromkeys(variables, ""), MODE="", DISABLED="") == default
    assert set(HIDDEN) - {"WANDB_DISABLED"} <= set(VARIABLES.values())


@pytest.mark.parametrize(("mode", "offline"), [("online", False), ("run", False), ("offline", True), ("dryrun", True)])
def test_the_modes_are_those_of_wandb(wandb: Wandb, mode: str, offline: bool) -> None:
    assert (wandb(MODE=mode) or {})["offline"] is offline


def test_files_and_flags_win_over_the_environment(wandb: Wandb, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("wandb: {project: file, offline: true}")
    file = ("-c", tmp_path / "mine.yaml")
    options = wandb(*file, "--wandb.group", "flag", PROJECT="env", RUN_GROUP="env", NAME="env", MODE="online")
    assert options is not None
    assert [options[name] for name in ("project", "group", "name", "offline")] == ["file", "flag", "env", True]
    assert wandb("--wandb", "null", PROJECT="env", MODE="online") is None


def test_a_variable_turns_wandb_off(wandb: Wandb) -> None:
    assert wandb("--wandb.group", "g", MODE="disabled") is None
    assert wandb("-c", "smoke", DISABLED="True", MODE="online") is None
    assert wandb(DISABLED="false") is not None
    options = wandb("--wandb.offline", "true", MODE="disabled", PROJECT="p")
    assert options is not None
    assert (options["offline"], options["project"]) == (True, "p")


def test_an_unknown_mode_is_refused(minigpt: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    outcome = minigpt("fit")
    message = "error: WANDB_MODE onlin in the environment: it must be online, offline or disabled\n"
    assert (outcome.status, outcome.err) == (2, message)
