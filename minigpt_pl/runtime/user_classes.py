"""Classes of the user's own beside this package's: registered by name, and the arguments that they add.

They go by name in a checkpoint too, since import paths change when files move. What is imported for a name on the
command line is in `cli.classes`.
"""

import inspect
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, get_type_hints

from minigpt_pl.runtime.errors import UserError


def is_own(cls: type) -> bool:
    """Whether this package defines the class."""
    return cls.__module__.startswith("minigpt_pl.")


def register(classes: dict[str, Any], cls: type) -> None:
    """Adds a class by its name. It replaces a user's class of that name, as when a cell of a notebook runs again.

    Raises:
        UserError: If a user's class has the name of one of this package.
    """
    name = cls.__name__
    if name in classes and is_own(classes[name]) and not is_own(cls):
        raise UserError(f"minigpt_pl has a class {name} itself", remedy="give yours another name")
    classes[name] = cls


def find_class(classes: Mapping[str, Any], class_path: Any, config: Mapping[str, Any]) -> Any:
    """The registered class that a configuration names, from whatever module; nothing is imported.

    Raises:
        UserError: If there is none.
    """
    cls = classes.get(str(class_path).rpartition(".")[2])
    if cls is None:
        problem = f"the checkpoint needs the class {str(class_path)[:100]}, which is not one of minigpt_pl"
        named = " ".join(user_class_args(config))[:200]
        raise UserError(problem, remedy=f"if you trust it, add {named}, or in Python import it first" if named else "")
    return cls


def import_path(cls: type) -> str:
    return f"minigpt_pl.{cls.__name__}" if is_own(cls) else f"{cls.__module__}.{cls.__qualname__}"


def user_class_args(config: Mapping[str, Any]) -> list[str]:
    """The options that name the user's own classes in a configuration; without them its checkpoints are not read."""
    paths = {
        "--model": config["model"].get("class_path"),
        "--data": config.get("data_class", "minigpt_pl.TextDataModule"),
    }
    named = [(option, str(path)) for option, path in paths.items() if not str(path).startswith("minigpt_pl.")]
    return [word for pair in named for word in pair]


def own_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments that a user's constructors name themselves, with their types; Any where there is none."""
    found: dict[str, inspect.Parameter] = {}
    for base in reversed([*takewhile(lambda base: not is_own(base), cls.__mro__)]):
        if "__init__" not in vars(base):
            continue
        constructor = vars(base)["__init__"]
        try:
            hints = get_type_hints(constructor)
        except NameError:  # a type that is imported for type checkers only
            hints = {}
        for name, argument in [*inspect.signature(constructor).parameters.items()][1:]:  # without self
            if argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
                found[name] = argument.replace(annotation=hints.get(name, Any))
    return found
