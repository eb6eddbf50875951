"""The options that a user gave, one by one: on the command line, in files, in braces.

Which options exist is in `options`; how files are named in `config_files`.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from minigpt_pl.cli.options import FIT_GROUPS, FIT_ONLY, SECTIONS, UserOption, flatten, option_name, option_type
from minigpt_pl.cli.yaml_values import load_options
from minigpt_pl.runtime.errors import UserError


def user_options(args: list[str], command: str) -> list[UserOption]:
    """The options of a command line, including those of its files, in their order.

    Raises:
        UserError: If a file cannot be read, or is not a YAML file of named options.
    """
    options, rest = [], list(args)
    while rest:
        typed, equals, value = rest.pop(0).partition("=")
        if not typed.startswith("-"):
            options.append(UserOption("", typed + equals + value, ""))
            continue
        takes_next = not equals and rest and not re.match(r"-(?![\d.])", rest[0])
        option = UserOption(option_name(typed), value if equals else rest.pop(0) if takes_next else None, typed)
        if option.name in ("c", "config"):
            content = read_options_file(str(option.value), "-c")
            for layer in layers(content, command):
                options += config_options(layer, str(option.value))
        elif option.value and option.value.startswith("{"):
            options += options_in_braces(option)
        elif option.name in ("model", "data", "trainer") and option.value and Path(option.value).is_file():
            options += config_options(read_options_file(option.value, typed), option.value, f"{option.name}.")
        else:
            options.append(option)
    return options


def options_in_braces(option: UserOption) -> list[UserOption]:
    """The options of a group that is given as one argument, in JSON or YAML."""
    try:
        content = load_options(option.value, option_type, option.name)
    except yaml.YAMLError:
        return [option]
    if not isinstance(content, dict) or not content:
        return [option]
    names = ((option_name(name), value) for name, value in flatten(content, f"{option.name}."))
    return [UserOption(name, value, f"--{name}") for name, value in names]


def read_options_file(file: str, typed: str) -> dict[str, Any]:
    """The content of a YAML file of options, which `typed` names. Raises UserError if it is none."""

    def error(problem: str, remedy: str = "") -> UserError:
        return UserError(problem, option=typed, value=file, remedy=remedy)

    if not Path(file).is_file():  # a directory, or a pipe, which cannot be read twice
        raise error("it is not a regular file", "name a YAML file")
    try:
        content = load_options(Path(file).read_text("utf-8"), option_type)
    except OSError as cause:
        raise error(f"the file cannot be read ({cause.strerror})", "name a YAML file") from None
    except UnicodeDecodeError as cause:
        byte = f"byte {cause.start} is 0x{cause.object[cause.start]:02x}"
        raise error(f"the file is not UTF-8: {byte}", "convert it to UTF-8") from None
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise error(f"the file is not valid YAML: {getattr(cause, 'problem', None) or cause}{line}") from None
    if not isinstance(content, dict):
        kind = {list: "a list", type(None): "empty"}.get(type(content), "plain text")
        raise error(f"the file is {kind}", "write options by name, such as data: {batch_size: 16}")
    return content


def layers(content: dict[str, Any], command: str) -> list[dict[str, Any]]:
    """What a file holds for a command: its options, and then those of its section of that name, which win.

    LightningCLI writes files with a section for each command. Sections of other commands are skipped, and so is what
    only `fit` has: then the config.yaml of a run can be used by every command.
    """
    sections = {name for name in SECTIONS if isinstance(content.get(name, 0), dict | None)}
    shared = {name: value for name, value in content.items() if name not in sections}
    found = [shared, content[command] or {}] if command in sections else [shared]
    if command != "fit":
        found = [{name: value for name, value in layer.items() if name not in FIT_GROUPS} for layer in found]
        for layer in found:
            if isinstance(trainer := layer.get("trainer"), dict):
                layer["trainer"] = {name: value for name, value in trainer.items() if name not in FIT_ONLY}
    return found


def config_options(config: dict[str, Any], file: str, prefix: str = "") -> list[UserOption]:
    """The options of a configuration that stands in a file; the model's class comes before its options."""
    names = [(option_name(name), value) for name, value in flatten(config, prefix)]
    return sorted([UserOption(name, value, name, file) for name, value in names], key=lambda one: one.name != "model")
