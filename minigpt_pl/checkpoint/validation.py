"""What the configuration in a checkpoint may contain. It is parsed like the user's own, but anyone may have written it.

How the file itself is read is in `io`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.user_classes import find_class, import_path, is_own, own_arguments

TRUSTED_PACKAGES = ("minigpt_pl.", "lightning.pytorch.")
PLAIN_VALUE = re.compile(r"[\w:+, -]*")  # of a Trainer option: a device, a precision, a time; not a file or class
IMPORT_PATH = re.compile(r"\w+(\.\w+)+")
MAX_BLOCK_SIZE = 1 << 20  # tokens: a checkpoint holds no rotary tables, whose length would prove the size


def validate_config(
    config: Any, path: Path, args: Iterable[str], models: Mapping[str, Any], data_modules: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration of the checkpoint at `path`, without the Trainer options that the command line, `args`, has.

    Its model is one of `models`, its data one of `data_modules`, which go by class name: a user's class is among them
    once the user has named it.

    Raises:
        UserError: If it would build a class that is neither of this project nor of Lightning. Users repeat their own.
    """
    sections = isinstance(config, dict) and [config.get(name) for name in ("model", "data", "trainer")]
    if not sections or not all(isinstance(section, dict) for section in sections) or "config" in config:
        raise UserError("it has no configuration of a run", option="ckpt_path", value=path)
    replaced = {arg.partition("=")[0].rstrip("+").removeprefix("--trainer.") for arg in args}
    trainer = {name: value for name, value in config["trainer"].items() if name not in replaced}
    _check_classes(trainer, path, allowed=True)
    _check_classes(config["model"].get("init_args"), path, allowed=False)
    rest = {name: section for name, section in config.items() if name not in ("model", "trainer")}
    _check_classes(rest, path, allowed=False)
    model = find_class(models, config["model"].get("class_path"), config)
    data = find_class(data_modules, config.get("data_class", "TextDataModule"), config)
    for classes, values in ((models, config["model"].get("init_args")), (data_modules, config["data"])):
        for cls in classes.values():  # whichever of them is built in the end
            _check_own_arguments(cls, values, path)
    return {name: section for name, section in config.items() if name != "data_class"} | {
        "trainer": trainer,
        "model": config["model"] | {"class_path": import_path(model)},  # no other module is imported for it
        "data": config["data"] | {"allow_data_change": False},  # consent to a changed text holds for one start
        **({} if is_own(data) else {"data_class": import_path(data)}),
    }


def _check_own_arguments(cls: type, values: Any, path: Path) -> None:
    """Of a user's class: where an argument may be a class or a function, the parser would import one by its path."""
    for name, argument in own_arguments(cls).items():
        if isinstance(values, dict) and argument.annotation not in (Any, str, str | None):
            _check_arguments(values.get(name), path)


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, (list, tuple)):
        yield from enumerate(node)


def _check_classes(node: Any, path: Path, allowed: bool) -> None:
    """Rejects what would build or import something untrusted; `allowed`: whether classes may be named at all."""
    for name, value in _children(node):
        if name == "class_path" and not (allowed and _is_trusted(value)):
            _reject(path, value)
        elif name == "init_args":
            _check_arguments(value, path)
        elif name != "class_path":
            _check_classes(value, path, allowed)
    if allowed and isinstance(node, str) and not PLAIN_VALUE.fullmatch(node) and not _is_trusted(node):
        _reject(path, node)


def _check_arguments(node: Any, path: Path) -> None:
    """The arguments of a class: plain values or classes as above, but no path of a function."""
    if isinstance(node, dict) and "class_path" in node:
        _check_classes(node, path, allowed=True)
        return
    for _, value in _children(node):
        _check_arguments(value, path)
    if isinstance(node, str) and IMPORT_PATH.fullmatch(node):
        _reject(path, node)


def _is_trusted(name: Any) -> bool:
    """Whether this is a class that a trusted package defines, not one that it only imports."""
    if not isinstance(name, str) or not name.startswith(TRUSTED_PACKAGES):
        return False
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError):
        return False
    return isinstance(cls, type) and cls.__module__.startswith((*TRUSTED_PACKAGES, "lightning.fabric."))


def _reject(path: Path, name: Any) -> NoReturn:
    problem = f"it contains {name!r}, which is not a class of minigpt_pl or Lightning"
    remedy = "if you trust it, repeat its option on the command line, such as --trainer.callbacks"
    raise UserError(problem, option="ckpt_path", value=path, remedy=remedy)


def validate_sizes(checkpoint: dict[str, Any], models: Mapping[str, Any]) -> None:
    """Compares the sizes in a checkpoint's configuration with its tensors, before memory is allocated for any.

    Raises:
        UserError: If they differ, or if its model is none of `models`, which go by class name.
    """
    cls: Any = None
    try:
        weights, model = checkpoint["state_dict"], checkpoint["config"]["model"]
        cls, args = find_class(models, model["class_path"], {"model": model}), model["init_args"]
        blocks = {key.split(".")[2] for key in weights if key.startswith("net.blocks.")}
        if is_own(cls) and args["n_layer"] != len(blocks):
            raise ValueError(f"n_layer is {args['n_layer']}, but the file has {len(blocks)} blocks")
        if not args["block_size"] <= MAX_BLOCK_SIZE:
            raise ValueError(f"block_size is {args['block_size']}, above {MAX_BLOCK_SIZE}")
        with torch.device("meta"):  # shapes without memory
            expected = cls(**{**args, "vocab_size": checkpoint["vocab_size"]}).state_dict()
        for key in sorted(expected.keys() | weights.keys()):
            shapes = [list(tensors[key].shape) if key in tensors else "missing" for tensors in (expected, weights)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{key} is {shapes[1]}, not {shapes[0]}")
    except Exception as error:  # the configuration may contain anything
        if cls is None and isinstance(error, UserError):
            raise
        problem = str(error)[:200] or repr(error)
        raise UserError(f"the checkpoint's configuration does not match its weights: {problem}") from None
