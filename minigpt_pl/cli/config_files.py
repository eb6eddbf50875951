"""The files on a command line: found by their names, and given to the parser as far as they are for the command.

What a file may contain, and which part of it a command uses, is in `given_options`.
"""

import json
import os
import re
from difflib import get_close_matches
from pathlib import Path

from minigpt_pl.cli.given_options import config_options, layers, read_options_file
from minigpt_pl.cli.options import CONFIGS, PATH_OPTIONS, option_specs, option_type
from minigpt_pl.cli.yaml_values import takes_null
from minigpt_pl.runtime.errors import UserError

MAX_OPTIONS_BYTES = 1 << 16
"""A larger file is a text: it would take long to find out that it is no YAML."""


def resolve_files(args: list[str]) -> list[str]:
    """The command line with the files meant: of -c NAME maybe the shipped one, and --data TEXT is --data.path TEXT."""
    rest = list(args)
    resolved: list[str] = []
    while rest:
        arg = rest.pop(0)
        flag, equals, value = (arg[:2], "=", arg[2:].lstrip("=")) if re.match("-c.", arg) else arg.partition("=")
        if flag not in ("-c", "--config", "--data"):
            resolved.append(as_null(arg, resolved[-1:]))
            continue
        value = value if equals else rest.pop(0) if rest else ""
        if flag == "--data":
            resolved += [f"--data.path={value}"] if is_text(value) else [arg] if equals or not value else [arg, value]
        elif value:
            resolved += ["--config", config_path(value)]
        else:
            raise UserError("its value is missing", option=flag, remedy=f"name a file, as in {flag} smoke")
    return resolved


def as_null(arg: str, before: list[str]) -> str:
    """The argument, or null where it is None, as Python spells it, and its option may be null."""
    flag, equals, value = arg.rpartition("=")
    if value == "None" and takes_null(option_type(flag if equals else "".join(before))):
        return f"{flag}{equals}null"
    return arg


def config_path(name: str) -> str:
    """The file of that name, or the shipped one."""
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file() or path == Path(name) and path.exists():
            return str(path)
    shipped = [str(path.relative_to(CONFIGS).with_suffix("")) for path in sorted(CONFIGS.rglob("*.yaml"))]
    near = get_close_matches(name.removesuffix(".yaml"), shipped, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"shipped files are {', '.join(shipped[:5])} and others"
    raise UserError("there is no such file", option="-c", value=name, remedy=remedy)


def is_text(file: str) -> bool:
    """Whether --data FILE names a text to train on, not a file of options."""
    if not os.path.isfile(file) or file.endswith((".yaml", ".yml", ".json")):
        return False
    if os.path.getsize(file) > MAX_OPTIONS_BYTES:
        return True
    try:
        found = config_options(read_options_file(file, "--data"), file, "data.")
    except UserError:
        return True
    return not all(option.name in option_specs("fit") for option in found)


def for_parser(args: list[str], command: str) -> list[str]:
    """A resolved command line, where a file that is not wholly for the command is replaced by what it has for it."""
    parsed: list[str] = []
    for arg in args:
        if parsed[-1:] == ["--config"]:
            used = layers(read_options_file(arg, "-c"), command)
            # As JSON, since the parser would read some text that YAML leaves without quotes as a number.
            parsed[-1:] = [text for layer in used for text in ("--config", json.dumps(layer, default=str))]
        elif parsed[-1:] and parsed[-1].removeprefix("--") in PATH_OPTIONS:
            parsed.pop()  # read already, and --print_config shows what a file may contain
        elif arg.partition("=")[0].removeprefix("--") not in PATH_OPTIONS or "=" not in arg:
            parsed.append(arg)
    return parsed
