"""How strong W&B's environment variables are: stronger than configs/default.yaml, weaker than files and flags.

Which variables there are is in `training.wandb_variables`.
"""

from typing import Any

import yaml

from minigpt_pl.cli.options import UserOption
from minigpt_pl.training.wandb_variables import OFFLINE, VARIABLES, is_disabled, read_variables


def apply_environment(
    args: list[str], given: list[UserOption], base: dict[str, Any]
) -> tuple[list[str], list[UserOption]]:
    """The command line of `fit` and its options, with what the environment adds to them.

    Args:
        args: The command line.
        given: Its options.
        base: The configuration of the checkpoint to start from, or empty. Its values are stronger than the environment,
            except for the mode: that belongs to the machine, which may be another one.

    Raises:
        UserError: If a variable has a value that W&B does not know.
    """
    texts, own = read_variables(), base.get("wandb", {})
    if is_disabled() and not any(option.name == "wandb.offline" for option in given):
        return [*args, "--wandb", "null"], given  # at the end: an option such as --wandb.group would turn W&B on again
    if own is None:
        return args, given
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name == "offline":
            values[name] = OFFLINE[text]
        elif own.get(name) is None:
            values[name] = text
    used = [UserOption(f"wandb.{name}", texts[name], VARIABLES[name], "the environment") for name in values]
    return ["--config", yaml.safe_dump({"wandb": values}), *args], [*used, *given]
