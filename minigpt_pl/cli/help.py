"""What --help shows of a command: its options in groups, the project's own first, with units and defaults.

The options themselves are in `options`.
"""

import re
import textwrap
from itertools import groupby
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from minigpt_pl.cli.classes import CLASSES, named_class
from minigpt_pl.cli.options import CONFIGS, TRAINER_HELP, OptionSpec, class_options, flatten, option_name, option_specs
from minigpt_pl.runtime.user_classes import is_own

WIDTH, COLUMN = 110, 38
TITLES = {
    "": "The run",
    "model": "The model and its optimizer; --model.help ModernLM lists all options, --model.help ClassicLM its own",
    "data": "The text, batches and evaluation; --data.help lists all options",
    "sample": "Prompts and sampling",
    "early_stopping": "Early stopping; --early_stopping null disables it",
    "checkpoint": "When last.ckpt is saved",
    "samples": "Samples of text in samples.txt; --samples null disables them",
    "wandb": "Weights & Biases; --wandb null disables it, --wandb.help lists all options",
    "trainer": "Lightning's Trainer; --trainer.help lists all of its options",
}
HIDDEN = {"validate": ("model", "seed"), "test": ("model", "seed"), "predict": ("model", "seed", "data")}
"""Options that a command takes but its help does not list: they come from the checkpoint."""
RARE = {
    "model.rms_norm_eps", "data.split", "data.split_unit", "data.bpe_min_pair_freq", "data.bpe_across_lines",
    "data.bpe_train_on", "wandb.entity", "wandb.id", "wandb.group", "wandb.job_type", "wandb.log_best",
}  # fmt: skip
"""Options that only the help of their group lists."""
METAVARS = {
    "config": "FILE", "run_dir": "DIR", "ckpt_path": "FILE", "init_from": "FILE", "model": "CLASS", "print_config": "",
    "teachers": "DIR", "wandb.tags": "A,B",
}  # fmt: skip


def is_help_request(args: list[str]) -> bool:
    return any(re.fullmatch(r"-h|--(\w+\.)?help(=.*)?", arg) for arg in args)


def render_help(command: str, args: list[str]) -> str:
    """The help on a command, on a group of its options (--trainer.help), or on a class (--model.help ClassicLM)."""
    group = next(arg for arg in args if is_help_request([arg])).partition("=")[0].lstrip("-").rpartition(".")[0]
    words = [arg.rpartition("=")[2] for arg in args] if group in CLASSES else []
    named = [cls for word in words if (cls := named_class(group, word))]

    def is_shown(name: str, spec: OptionSpec) -> bool:
        if group:
            argument = name.removeprefix(f"{group}.")
            return argument != name and (not named or any(argument in class_options(cls) for cls in named))
        rare = name in RARE or name.startswith("trainer.") and name.removeprefix("trainer.") not in TRAINER_HELP
        return not (rare or spec.only not in ("", "ModernLM") or name.startswith(HIDDEN.get(command, ())))

    specs = option_specs(command, *(cls for cls in named if not is_own(cls)))
    shown = {name: spec for name, spec in specs.items() if is_shown(name, spec)}
    defaults = {name: spec.default for name, spec in shown.items()}
    lines = [f"usage: minigpt {command} [options]"]
    if command == "fit":
        values = flatten(yaml.safe_load((CONFIGS / "default.yaml").read_text("utf-8")))
        defaults |= {option_name(name): value for name, value in values if name != "model.class_path"}
        lines.append("Defaults are in brackets. Files and options apply in their order: the last one wins.")
    for title, names in groupby(shown, key=lambda name: name.partition(".")[0] if "." in name else ""):
        lines += ["", f"{TITLES[title]}:"]
        for name in names:
            lines += format_option(name, shown[name], defaults[name])
    return "\n".join(lines)


def format_option(name: str, spec: OptionSpec, default: Any) -> list[str]:
    """One option in a line or two."""
    text = f"{spec.only}: {spec.help}".strip() if spec.only else spec.help
    if isinstance(default, (int, float, str)) and str(default).strip():
        text += f" [{str(default).lower() if isinstance(default, bool) else default}]"
    option = f"  {'-c, ' * (name == 'config')}--{name} {METAVARS[name] if name in METAVARS else metavar(spec.type)} "
    wrapped = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    fits = len(option) <= COLUMN
    lines = [f"{option:{COLUMN}}{wrapped.pop(0)}" if fits else option.rstrip()]
    return lines + [" " * COLUMN + line for line in wrapped]


def metavar(hint: Any) -> str:
    """The placeholder for a value of this type."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    members = [member for member in get_args(hint) or (hint,) if member is not NoneType]
    bases = [getattr(member, "_type", member) for member in members]  # int or float of a restricted number type
    names = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    return names.get(float if set(bases) == {int, float} else bases[0], "...")
