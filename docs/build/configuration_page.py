"""Writes docs/configuration.md, the table of every option, from the command line's own parser.

`python docs/build/configuration_page.py` after an option or its help text has changed.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from minigpt_pl.cli.help import METAVARS, metavar
from minigpt_pl.cli.options import CONFIGS, OptionSpec, flatten, option_name, option_specs

PAGE = Path(__file__).parents[1] / "configuration.md"
COMMANDS = ("fit", "validate", "test", "predict")
HEAD = """# Every option

On the command line an option begins with two dashes (`--data.batch_size 16`). In a file for `-c` the dots are levels
(`data: {batch_size: 16}`). Files and flags are read in their order, and the last one wins. A checkpoint is weaker than
both, `configs/default.yaml` is weaker than the checkpoint, and the defaults in the code are the weakest. Variables of
Weights & Biases stand above `configs/default.yaml`; [its page](wandb.md) lists them.

Every command takes the `config.yaml` of a run: `validate`, `test` and `predict` skip what only `fit` has. (On the
command line they refuse it.) A file may have a section for each command, as LightningCLI writes it, such as
`fit: {data: {batch_size: 16}}`; a command reads its own section only. `--data my.txt` is short for
`--data.path my.txt`; a YAML file there holds options.

The column "default" shows the values of a `fit` without files. A dash means that there is no default, or that it
follows from another option. `--config`, `--run_dir`, `--ckpt_path` and `--print_config` are for the command line only.
This project sets the `--trainer` options that are not listed; the command line names the option to use instead.

This page is written by `python docs/build/configuration_page.py` from the parser.

| option | value | default | commands | what it does |
|---|---|---|---|---|
"""


def render() -> str:
    """The text of the page."""
    default_yaml = yaml.safe_load((CONFIGS / "default.yaml").read_text("utf-8"))
    defaults = {option_name(name): value for name, value in flatten(default_yaml)}
    specs: dict[str, tuple[OptionSpec, list[str]]] = {}
    for command in COMMANDS:
        for name, spec in option_specs(command).items():
            specs.setdefault(name, (spec, []))[1].append(command)
    rows = [format_row(name, spec, defaults.get(name, spec.default), used) for name, (spec, used) in specs.items()]
    return HEAD + "\n".join(rows) + "\n"


def format_row(name: str, spec: OptionSpec, default: Any, commands: list[str]) -> str:
    no_default = default is OptionSpec._field_defaults["default"] or default in ("", None)
    cells = [
        f"`--{name}`",
        (METAVARS[name] if name in METAVARS else metavar(spec.type)) or "-",
        "-" if no_default else f"`{format_value(default)}`",
        "all" if len(commands) == len(COMMANDS) else ", ".join(commands),
        f"{spec.only}: {spec.help}" if spec.only else format_help(spec.help),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def format_help(text: str) -> str:
    """Lightning's help in this page's markup, without the default, which has its own column."""
    text = re.sub(r":paramref:`~[\w.]+\.(\w+)`", r"`\1`", text)
    return re.sub(r"\s*Default: ``.*?``\.$", "", text).replace("``", "`")


def format_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("\n", "\\n")


if __name__ == "__main__":
    PAGE.write_text(render(), "utf-8")
