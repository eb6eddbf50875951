"""What --help shows of a command: its settings in groups, our own first, with units and defaults; what is kept quiet.

What is known of a setting is in `settings`.
"""

import logging
import re
import textwrap
import warnings
from itertools import groupby
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from minigpt_pl.cli.options import CONFIGS, TRAINER_HELP, OptionSpec, flatten, option_name, option_specs

WIDTH, COLUMN = 110, 38
TITLES = {
    "": "The run",
    "model": "The model",
    "data": "The text, its batches and checks",
    "sample": "What is continued, and how",
    "early_stopping": "When to stop; --early_stopping null is never",
    "checkpoint": "When last.ckpt is saved",
    "samples": "Text in samples.txt; --samples null is none",
    "wandb": "Weights & Biases; --wandb null is off",
    "trainer": "Lightning's Trainer; --trainer.help lists all that may be set",
}
HIDDEN = {"validate": ("model", "seed"), "test": ("model", "seed"), "predict": ("model", "seed", "data")}
"""What may be given to a command but is seldom meant to be: the checkpoint has it."""
METAVARS = {"config": "FILE", "run_dir": "DIR", "ckpt_path": "FILE", "model": "CLASS", "print_config": ""}


def is_help_request(words: list[str]) -> bool:
    return any(re.fullmatch(r"-h|--(\w+\.)?help(=.*)?", word) for word in words)


def render_help(command: str, words: list[str]) -> str:
    """The help that the words ask for: of the command, of one group (--trainer.help), of one model's settings."""
    group = next(word for word in words if is_help_request([word])).partition("=")[0].lstrip("-").rpartition(".")[0]
    models = [
        name
        for name in ("ClassicLM", "AblationLM", "ModernLM")
        if group == "model" and any(name in word for word in words)
    ]

    def is_shown(name: str, setting: OptionSpec) -> bool:
        if group:
            return name.startswith(f"{group}.") and setting.only in ("", *(models or [setting.only]))
        rare = (
            name.startswith("trainer.")
            and name.removeprefix("trainer.") not in TRAINER_HELP
            or setting.only == "AblationLM"
        )
        return not rare and not name.startswith(HIDDEN.get(command, ()))

    shown = {name: setting for name, setting in option_specs(command).items() if is_shown(name, setting)}
    defaults = {name: setting.default for name, setting in shown.items()}
    lines = [f"usage: minigpt {command} [options]"]
    if command == "fit":
        values = flatten(yaml.safe_load((CONFIGS / "default.yaml").read_text("utf-8")))
        defaults |= {option_name(name): value for name, value in values if name != "model.class_path"}
        lines.append("Defaults stand in brackets. Files and options count in their order: the last one wins.")
    for of, names in groupby(shown, key=lambda name: name.partition(".")[0] if "." in name else ""):
        lines += ["", f"{TITLES[of]}:"]
        for name in names:
            lines += format_option(name, shown[name], defaults[name])
    return "\n".join(lines)


def format_option(name: str, setting: OptionSpec, default: Any) -> list[str]:
    """One setting in a line or two."""
    text = f"{setting.only}: {setting.help}" if setting.only else setting.help
    if isinstance(default, (int, float, str)) and str(default).strip():
        text += f" [{str(default).lower() if isinstance(default, bool) else default}]"
    option = f"  {'-c, ' * (name == 'config')}--{name} {METAVARS[name] if name in METAVARS else metavar(setting.type)} "
    wrapped = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    first = (
        [f"{option:{COLUMN}}{wrapped[0]}"] if len(option) <= COLUMN else [option.rstrip(), " " * COLUMN + wrapped[0]]
    )
    return first + [" " * COLUMN + line for line in wrapped[1:]]


def metavar(hint: Any) -> str:
    """What stands for a value of this type."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    names = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    members = [member for member in get_args(hint) or (hint,) if member is not NoneType]
    return names.get(float if set(members) == {int, float} else members[0], "...")


def silence_libraries() -> None:
    """No advertisements, no roll call of devices, no advice that does not hold here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for advice in (
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*You're resuming from a checkpoint that ended.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*exists and is not empty.*",
        ".*functional.all_gather is deprecated.*",
        ".*smaller than the logging interval.*",
        ".*predict returned None.*",
        ".*Trying to infer the `batch_size`.*",
    ):
        warnings.filterwarnings("ignore", advice)
