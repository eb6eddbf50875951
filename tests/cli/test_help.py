"""--help: every setting once, in groups, our own first, with units and defaults; and the light answers come at once."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml
from conftest import PROJECT, Outcome

from minigpt_pl.__main__ import COMMANDS
from minigpt_pl.cli.options import TRAINER_HELP, flatten, option_name, option_specs
from minigpt_pl.training.lit_modules import ModernLM

MiniGPT = Callable[..., Outcome]

HEAVY = ("torch", "lightning", "numpy", "wandb", "jsonargparse", "yaml", "tokenizers")


def names(page: str) -> list[str]:
    """The options that a page of help lists, in order."""
    words = [line.replace("-c, ", "").split()[0] for line in page.splitlines() if line.startswith("  -")]
    return [word.removeprefix("--") for word in words]


def test_the_help_of_fit_is_short_and_says_every_setting_with_its_default(minigpt: MiniGPT) -> None:
    done = minigpt("fit", "--help")
    assert (done.status, done.err) == (0, "")
    assert len(done.out.splitlines()) <= 100
    assert max(map(len, done.out.splitlines())) <= 110
    listed = names(done.out)
    rare = ("trainer.", "model.stage")
    known = [name for name in option_specs("fit") if not name.startswith(rare)]
    assert listed == known + [f"trainer.{name}" for name in TRAINER_HELP]
    defaults = dict(flatten(yaml.safe_load((PROJECT / "configs" / "default.yaml").read_text("utf-8"))))
    of_line = {name: line for name, line in zip(listed, options(done.out), strict=True)}
    for name, value in defaults.items():
        if name != "model.class_path":
            assert f"[{value}]" in of_line[option_name(name)]
    assert "[128]" in of_line["model.n_embd"]  # the code's own default
    assert "ModernLM:" in of_line["model.rope_theta"]
    assert "ModernLM:" not in of_line["model.dropout"]


def options(page: str) -> list[str]:
    """Each option's text in one line."""
    found: list[str] = []
    for line in page.splitlines():
        if line.startswith("  -"):
            found.append(line)
        elif line.startswith("   "):
            found[-1] += " " + line.strip()
    return found


def test_our_own_options_come_before_lightnings(minigpt: MiniGPT) -> None:
    listed = names(minigpt("fit", "-h").out)
    assert listed[:3] == ["config", "run_dir", "ckpt_path"]
    groups = list(dict.fromkeys(name.partition(".")[0] for name in listed if "." in name))
    assert groups == ["model", "data", "early_stopping", "last", "samples", "wandb", "trainer"]


def test_whatever_is_listed_is_taken_and_whatever_is_taken_is_listed(minigpt: MiniGPT) -> None:
    """The page is not the parser's own: here they are held together."""
    printed = minigpt("fit", "--print_config", "--model.n_layer", "3")
    assert printed.status == 0
    resolved = {option_name(name) for name, _ in flatten(yaml.safe_load(printed.out))} - {"model"}
    listed = set(names(minigpt("fit", "--trainer.help").out)) | set(names(minigpt("fit", "--help").out))
    of_others = {name for name, setting in option_specs("fit").items() if setting.only not in ("", "ModernLM")}
    assert resolved == listed - of_others - {"config", "print_config", "model"}


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_need_no_checkpoint_for_their_help(minigpt: MiniGPT, command: str) -> None:
    done = minigpt(command, "--help")
    assert (done.status, done.err) == (0, "")
    listed = names(done.out)
    assert "ckpt_path" in listed
    assert ("sample.temperature" in listed) == (command == "predict")
    assert "trainer.max_steps" not in listed


def test_help_of_a_group_is_that_group_alone(minigpt: MiniGPT) -> None:
    listed = names(minigpt("fit", "--model.help", "ModernLM").out)
    taken = [name for name in ModernLM.__init__.__annotations__ if name not in ("vocab_size", "return")]
    assert sorted(listed) == sorted(f"model.{name}" for name in taken)
    assert "model.rope_theta" not in names(minigpt("fit", "--model.help=ClassicLM").out)
    listed = names(minigpt("fit", "--trainer.help").out)
    assert "trainer.detect_anomaly" in listed
    assert "trainer.val_check_interval" not in listed
    assert all(name.startswith("trainer.") for name in listed)
    assert names(minigpt("fit", "--wandb.help").out)[0] == "wandb.offline"


def test_a_prompt_that_ends_in_help_is_a_prompt(minigpt: MiniGPT) -> None:
    done = minigpt("predict", "--sample.prompt=--help")
    assert (done.status, done.out) == (2, "")


def test_light_answers_import_nothing_heavy() -> None:
    """One process gives them all: the list of commands, no command, a wrong command."""
    code = "import sys; from minigpt_pl.__main__ import main; "
    code += "status = [main(words) for words in (['--help'], ['-h'], [], ['fti'])]; "
    code += f"print(status, [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    *page, last = done.stdout.splitlines()
    assert last == "[0, 0, 2, 2] []"
    assert [line.split()[0] for line in page if line.startswith("  ")] == list(COMMANDS) * 2
    assert len(done.stderr.splitlines()) == 2
