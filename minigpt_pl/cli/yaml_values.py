"""Values in YAML files of options: they mean what they mean on the command line.

YAML 1.1 reads 010 as eight, 10:00:00:00 as a number of seconds and the name 123 as a number; the command line does not.
"""

import re
from collections.abc import Callable
from types import NoneType
from typing import Any, get_args

import yaml
from jsonargparse import set_loader
from jsonargparse._loaders_dumpers import get_yaml_default_loader, yaml_load

NUMBERS = {int, float, bool}
OTHER_BASES = re.compile(r"[-+]?0[xob]|.*:")
"""Numbers of YAML that are none on the command line."""

SURROGATE = re.compile(r"\\u[dD][c-fC-F]", re.ASCII)
"""How YAML and JSON spell a byte of a path that is not UTF-8."""


def accept_any_path() -> None:
    """Makes jsonargparse read paths that are not UTF-8 from a configuration, which libyaml refuses."""

    def load(text: str) -> Any:
        try:
            return yaml_load(text)
        except yaml.YAMLError:
            if not SURROGATE.search(text):
                raise
            resolvers = {"yaml_implicit_resolvers": get_yaml_default_loader().yaml_implicit_resolvers}
            return yaml.load(text, type("PythonLoader", (yaml.SafeLoader,), resolvers))

    set_loader("yaml", load, exceptions=(yaml.YAMLError,))


def load_options(text: str, hint_of: Callable[[str], Any], prefix: str = "") -> Any:
    """The content of a YAML file; `hint_of` gives the type of an option by its name, and `prefix` begins each name.

    Raises:
        yaml.YAMLError: If it is not YAML.
    """
    return _as_typed(yaml.safe_load(text), yaml.load(text, yaml.BaseLoader), prefix, hint_of)


def takes_null(hint: Any) -> bool:
    return NoneType in get_args(hint)


def _as_typed(value: Any, text: Any, name: str, hint_of: Callable[[str], Any]) -> Any:
    """A value of YAML, which stands as `text` in the file."""
    if isinstance(value, dict) and isinstance(text, dict) and len(value) == len(text):
        pairs = zip(value.items(), text.values(), strict=True)
        return {key: _as_typed(one, word, f"{name}.{key}".lstrip("."), hint_of) for (key, one), word in pairs}
    if isinstance(value, list) and isinstance(text, list):
        return [_as_typed(one, word, name, hint_of) for one, word in zip(value, text, strict=True)]
    hint = hint_of(name)
    if text == "None" and takes_null(hint):
        return None
    if value is None or not isinstance(text, str) or isinstance(value, str):
        return value
    members = {*get_args(hint)} or {hint}
    if str in members and not NUMBERS & members:
        return text
    if re.fullmatch(r"[-+]?0\d+", text):
        return int(text)
    return text if isinstance(value, (int, float)) and OTHER_BASES.match(text) else value
