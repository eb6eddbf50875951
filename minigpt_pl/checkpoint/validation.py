"""What the settings inside a checkpoint may say: they are parsed like the user's own, but anyone may have written them.

How the file itself is read is in `checkpoint`.
"""

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from minigpt_pl.runtime.errors import UserError

TRUSTED_PACKAGES = ("minigpt_pl.", "lightning.pytorch.")
PLAIN_VALUE = re.compile(r"[\w:+, -]*")
"""What a setting of the Trainer may be, where it is a string: a device, a precision, a time; no file and no class."""
IMPORT_PATH = re.compile(r"\w+(\.\w+)+")
MAX_BLOCK_SIZE = 1 << 20
"""Tokens of context that a checkpoint may claim: rotary tables leave no trace in it."""


def validate_config(settings: Any, path: Path, options: Iterable[str]) -> dict[str, Any]:
    """The settings of a checkpoint, if nothing but this project's and Lightning's classes is built from them.

    Args:
        settings: As the checkpoint has them.
        path: The checkpoint, for messages.
        options: The command line; what it says of the Trainer again is not taken from the checkpoint.

    Raises:
        InputError: If a class is neither; a user's own must be given again on the command line.
    """
    sections = isinstance(settings, dict) and [settings.get(name) for name in ("model", "data", "trainer")]
    if not sections or not all(isinstance(section, dict) for section in sections) or "config" in settings:
        raise UserError(f"{path} has no settings of a run")
    again = {option.partition("=")[0].rstrip("+").removeprefix("--trainer.") for option in options}
    trainer = {name: value for name, value in settings["trainer"].items() if name not in again}
    _check_classes(trainer, path, built=True)
    _check_classes(settings["model"].get("init_args"), path, built=False)
    _check_classes(
        {name: section for name, section in settings.items() if name not in ("model", "trainer")}, path, built=False
    )
    # To go on with a changed text is agreed to once, not for ever.
    return settings | {"trainer": trainer, "data": settings["data"] | {"allow_data_change": False}}


def _check_classes(node: Any, path: Path, built: bool) -> None:
    """Refuses what would build or import a thing that is not trusted; `built`: where classes may be named at all."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "class_path":
                if not built or not _is_trusted(value):
                    _reject_class(path, value)
            elif name == "init_args":
                _check_arguments(value, path)
            else:
                _check_classes(value, path, built)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _check_classes(value, path, built)
    elif built and isinstance(node, str) and not PLAIN_VALUE.fullmatch(node) and not _is_trusted(node):
        _reject_class(path, node)


def _check_arguments(node: Any, path: Path) -> None:
    """The arguments of a class: plain values, or classes as before; nothing that could be imported as a function."""
    if isinstance(node, dict):
        if "class_path" in node:
            _check_classes(node, path, built=True)
        else:
            for value in node.values():
                _check_arguments(value, path)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _check_arguments(value, path)
    elif isinstance(node, str) and IMPORT_PATH.fullmatch(node):
        _reject_class(path, node)


def _is_trusted(name: Any) -> bool:
    """Whether this is a class that one of the trusted packages defines, not one that they only import."""
    if not isinstance(name, str) or not name.startswith(TRUSTED_PACKAGES):
        return False
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError):
        return False
    return isinstance(found, type) and found.__module__.startswith((*TRUSTED_PACKAGES, "lightning.fabric."))


def _reject_class(path: Path, name: Any) -> NoReturn:
    raise UserError(
        f"{path} names {name!r}, which is no class of minigpt_pl or Lightning: if you trust it, give it again on the "
        "command line, with --trainer.callbacks or where it stood"
    )


def validate_sizes(saved: dict[str, Any], models: Mapping[str, Any]) -> None:
    """Compares the sizes that a checkpoint's settings claim with its tensors, before memory is taken for any.

    Args:
        saved: A checkpoint that `read_checkpoint` has read.
        models: The classes that it may name, by their import paths.

    Raises:
        InputError: If they differ, or the settings are those of no model.
    """
    try:
        found, model = saved["state_dict"], saved["settings"]["model"]
        named, settings = (
            model["class_path"].rpartition(".")[2],
            {**model["init_args"], "vocab_size": saved["vocab_size"]},
        )
        if named not in models:
            raise ValueError(f"there is no model {named!r}; there are {', '.join(models)}")
        blocks = {name.split(".")[2] for name in found if name.startswith("net.blocks.")}
        if settings["n_layer"] != len(blocks):
            raise ValueError(f"n_layer is {settings['n_layer']}, and {len(blocks)} blocks are there")
        if not settings["block_size"] <= MAX_BLOCK_SIZE:
            raise ValueError(f"block_size is {settings['block_size']}, above {MAX_BLOCK_SIZE}")
        with torch.device("meta"):  # shapes without numbers
            claimed = models[named](**settings).state_dict()
        for name in sorted(claimed.keys() | found.keys()):
            sizes = [list(weights[name].shape) if name in weights else "missing" for weights in (claimed, found)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"{name} is {sizes[1]}, not {sizes[0]}")
    except Exception as error:  # settings may hold anything
        problem = str(error)[:200] or repr(error)
        raise UserError(f"the checkpoint's settings do not fit its weights: {problem}") from None
