"""--help lists every option once, in groups, with units and defaults; --help alone and unknown commands are fast."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml
from conftest import PROJECT, Outcome

from minigpt_pl.__main__ import COMMANDS
from minigpt_pl.cli.help import RARE
from minigpt_pl.cli.options import TRAINER_HELP, flatten, option_name, option_specs
from minigpt_pl.training.lit_modules import ModernLM

MiniGPT = Callable[..., Outcome]

HEAVY = ("torch", "lightning", "numpy", "wandb", "jsonargparse", "yaml", "tokenizers")


def names(page: str) -> list[str]:
    """The options that a help page lists, in order."""
    options = [line.replace("-c, ", "").split()[0] for line in page.splitlines() if line.startswith("  -")]
    return [option.removeprefix("--") for option in options]


def test_the_help_of_fit_is_short_and_lists_every_option_with_its_default(minigpt: MiniGPT) -> None:
    outcome = minigpt("fit", "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert len(outcome.out.splitlines()) <= 100
    assert max(map(len, outcome.out.splitlines())) <= 110
    listed = names(outcome.out)
    known = [name for name, spec in option_specs("fit").items() if spec.only in ("", "ModernLM")]
    known = [name for name in known if not name.startswith("trainer.") and name not in RARE]
    assert listed == known + [f"trainer.{name}" for name in TRAINER_HELP]
    defaults = dict(flatten(yaml.safe_load((PROJECT / "configs" / "default.yaml").read_text("utf-8"))))
    lines = dict(zip(listed, options(outcome.out), strict=True))
    for name, value in defaults.items():
        if name != "model.class_path":
            assert f"[{value}]" in lines[option_name(name)]
    assert "[128]" in lines["model.n_embd"]  # the default in the code
    assert "ModernLM:" in lines["model.rope_theta"]
    assert "ModernLM:" not in lines["model.dropout"]


def options(page: str) -> list[str]:
    """The text of each option in one line."""
    lines: list[str] = []
    for line in page.splitlines():
        if line.startswith("  -"):
            lines.append(line)
        elif line.startswith("   "):
            lines[-1] += " " + line.strip()
    return lines


def test_the_projects_own_options_come_before_lightnings(minigpt: MiniGPT) -> None:
    listed = names(minigpt("fit", "-h").out)
    assert listed[:3] == ["config", "run_dir", "ckpt_path"]
    groups = list(dict.fromkeys(name.partition(".")[0] for name in listed if "." in name))
    assert groups == ["model", "data", "early_stopping", "checkpoint", "samples", "wandb", "trainer"]


def test_help_lists_exactly_the_options_that_the_parser_knows(minigpt: MiniGPT) -> None:
    printed = minigpt("fit", "--print_config", "--model.n_layer", "3")
    assert printed.status == 0
    resolved = {option_name(name) for name, _ in flatten(yaml.safe_load(printed.out))} - {"model"}
    pages = (("--help",), ("--model.help", "ModernLM"), ("--trainer.help",), ("--data.help",), ("--wandb.help",))
    listed = {name for page in pages for name in names(minigpt("fit", *page).out)}
    others = {name for name, spec in option_specs("fit").items() if spec.only not in ("", "ModernLM")}
    assert resolved == listed - others - {"config", "print_config", "model"}


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_help_of_other_commands_needs_no_checkpoint(minigpt: MiniGPT, command: str) -> None:
    outcome = minigpt(command, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    listed = names(outcome.out)
    assert "ckpt_path" in listed
    assert ("sample.temperature" in listed) == (command == "predict")
    assert "trainer.max_steps" not in listed


def test_help_of_a_group_lists_that_group_only(minigpt: MiniGPT) -> None:
    listed = names(minigpt("fit", "--model.help", "ModernLM").out)
    fields = [field.name for field in dataclasses.fields(ModernLM.config_class) if field.name != "vocab_size"]
    assert sorted(listed) == sorted(f"model.{name}" for name in fields)
    classic = names(minigpt("fit", "--model.help=ClassicLM").out)
    assert "model.gelu" in classic
    assert "model.rope_theta" not in classic
    listed = names(minigpt("fit", "--trainer.help").out)
    assert "trainer.detect_anomaly" in listed
    assert "trainer.default_root_dir" not in listed
    assert all(name.startswith("trainer.") for name in listed)
    assert names(minigpt("fit", "--wandb.help").out)[0] == "wandb.offline"


def test_a_prompt_that_ends_in_help_is_a_prompt(minigpt: MiniGPT) -> None:
    outcome = minigpt("predict", "--sample.prompt=--help")
    assert (outcome.status, outcome.out) == (2, "")


def test_the_list_of_commands_and_an_unknown_command_import_nothing_heavy() -> None:
    code = "import sys; from minigpt_pl.__main__ import main; "
    code += "status = [main(words) for words in (['--help'], ['-h'], [], ['fti'])]; "
    code += f"print(status, [name for name in {HEAVY} if name in sys.modules])"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    *page, last = outcome.stdout.splitlines()
    assert last == "[0, 0, 2, 2] []"
    assert [line.split()[0] for line in page if line.startswith("  ")] == list(COMMANDS) * 2
    assert len(outcome.stderr.splitlines()) == 2
