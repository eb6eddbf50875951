"""The classes behind --model and --data: the user's own are imported where the command line or its files name them.

A class that only a checkpoint names is not imported; `checkpoint.validation` refuses it.
"""

import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from minigpt_pl.data.datamodule import DATA_MODULES, TextDataModule
from minigpt_pl.runtime.errors import UserError, one_line
from minigpt_pl.runtime.user_classes import import_path, is_own, register
from minigpt_pl.training.lit_modules import MODELS, LanguageModel

CLASSES: dict[str, dict[str, Any]] = {"model": MODELS, "data": DATA_MODULES}
"""By group of options and class name."""
BASES = {"model": LanguageModel, "data": TextDataModule}
FILE_SUFFIXES = (".yaml", ".yml", ".json", ".txt", ".md")


def find_modules_here() -> None:
    """Makes modules in the current directory importable. They come last, so that no file hides a library."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def is_import_path(value: Any) -> bool:
    """Whether a value of --model or --data names a class in a module, such as my_module.MyLM, and not a file."""
    is_path = isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)+", value) is not None
    return is_path and not value.endswith(FILE_SUFFIXES) and not Path(value).is_file()


def named_class(group: str, value: Any) -> Any:
    """The class that a value of --model or --data names; None if it names none.

    Raises:
        UserError: If its module cannot be imported, or has no such class, or one that cannot be used here.
    """
    if not is_import_path(value):
        return CLASSES[group].get(value) if isinstance(value, str) else None
    own = CLASSES[group].get(value.rpartition(".")[2])
    if own and is_own(own) and value.startswith("minigpt_pl."):
        return own
    try:
        cls = _imported(value)
        _check(group, cls, value)
        return cls
    except UserError as error:
        raise UserError(error.problem, option=f"--{group}", value=value, remedy=error.remedy) from error


def named_classes(user_options: Iterable[Any]) -> dict[str, Any]:
    """The classes that the user's options name for the model and for the data, the last of each; they are imported."""
    found: dict[str, Any] = {}
    for option in user_options:
        try:
            cls = named_class(option.name, option.value) if option.name in CLASSES else None
        except UserError as error:
            raise UserError(error.format(str(option))) from error
        found |= {option.name: cls} if cls else {}
    for group, cls in found.items():
        register(CLASSES[group], cls)  # again: a module that was imported later may have a class of the same name
    return found


def _imported(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    find_modules_here()
    try:
        module = import_module(module_name)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{module_name} cannot be imported: there is no module {error.name}") from error
        near = get_close_matches(module_name, [file.stem for file in Path.cwd().glob("*.py")], n=1)
        remedy = f"did you mean {near[0]}?" if near else "start minigpt in the folder of its file, or set PYTHONPATH"
        raise UserError(f"there is no module {error.name}", remedy=remedy) from error
    except Exception as error:
        cause = f"{type(error).__name__}: {one_line(error)}{line_in(module_name, error)}"
        raise UserError(f"{module_name} cannot be imported: {cause}") from error
    if not hasattr(module, name):
        near = get_close_matches(name, vars(module), n=1)
        raise UserError(f"{module_name} has no {name}", remedy=f"did you mean {near[0]}?" if near else "")
    return getattr(module, name)


def _check(group: str, cls: Any, path: str) -> None:
    base, example = BASES[group], {"model": "ModernLM", "data": "TextDataModule"}[group]
    is_derived = inspect.isclass(cls) and issubclass(cls, base)
    if not is_derived:
        remedy = f"make it a subclass of minigpt_pl.{example}, or write a LightningCLI (docs/python.md)"
        raise UserError(f"it is not a class derived from {base.__name__}", remedy=remedy)
    if inspect.isabstract(cls):
        raise UserError(f"it does not define {', '.join(sorted(cls.__abstractmethods__))}")
    if not path.endswith(f".{cls.__name__}"):
        raise UserError(f"the name of the class is {cls.__name__}", remedy="use that name")
    if missing := _missing_options(cls):
        remedy = "pass all options on, as in def __init__(self, **config) and super().__init__(**config)"
        raise UserError(f"it does not take {', '.join(missing[:3])}", remedy=remedy)


@cache
def _missing_options(cls: Any) -> list[str]:
    """Options that a class should have, but that its constructor does not take, by its source code."""
    accepted = ArgumentParser().add_class_arguments(cls, fail_untyped=False)
    return [field.name for field in fields(cls.config_class) if field.name not in accepted]


def line_in(module: str, error: BaseException) -> str:
    """The last line of a module that led to an error, as " (line N of MODULE)"; "" if none did."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == module:
            found = f" (line {trace.tb_lineno} of {module})"
        trace = trace.tb_next
    return found


def class_name(config: Mapping[str, Any]) -> str:
    """The model's class in a configuration, without its module."""
    return str(config["model"]["class_path"]).rpartition(".")[2]


def config_classes(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """The user's own classes in a configuration, as far as they are imported."""
    model = MODELS.get(str((config.get("model") or {}).get("class_path")).rpartition(".")[2])
    return tuple(cls for cls in (model, data_class(config)) if cls is not None and not is_own(cls))


# The data module. Its options stand in its group without init_args, whatever its class, so that configurations compare;
# a class of the user stands in the option data_class.


def data_class(config: Mapping[str, Any]) -> type[TextDataModule] | None:
    """The user's own class of a configuration, if it is imported."""
    return DATA_MODULES.get(str(config.get("data_class")).rpartition(".")[2])


def add_data_options(parser: LightningArgumentParser, cls: type[TextDataModule] | None) -> str:
    """Adds the options of the data module, and of its class if the user has named one; returns where they are."""
    if cls is None:
        parser.add_lightning_class_args(TextDataModule, "data")
        return "data"
    parser.add_subclass_arguments(TextDataModule, "data", default={"class_path": import_path(cls)}, fail_untyped=False)
    parser.add_argument("--data_class", type=str, default=import_path(cls))
    return "data.init_args"


def flat_data(config: dict[str, Any]) -> dict[str, Any]:
    """The parsed configuration as it is stored."""
    if "data_class" not in config:
        return config
    data = config["data"]
    config |= {"data": data["init_args"], "data_class": data["class_path"]}
    return {name: value for name, value in config.items() if value != "minigpt_pl.TextDataModule"}
