"""Types of numbers with a range: the command line checks them while parsing, `check_ranges` does for Python users.

jsonargparse registers each range once in a process, so all rooms take their types from here.
"""

import math
import re
from types import NoneType
from typing import Any, get_args, get_type_hints

from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from minigpt_pl.runtime.errors import UserError

__all__ = ["NonNegativeFloat", "NonNegativeInt", "OpenUnitInterval", "PositiveFloat", "PositiveInt"]

PositiveFinite = restricted_number_type("PositiveFinite", float, [(">", 0), ("<", math.inf)])
NonNegativeFinite = restricted_number_type("NonNegativeFinite", float, [(">=", 0), ("<", math.inf)])
Fraction = restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)])
Probability = restricted_number_type("Probability", float, [(">", 0), ("<=", 1)])
TokenCount = restricted_number_type("TokenCount", int, [(">", 0), ("<=", 10**7)])
SampleCount = restricted_number_type("SampleCount", int, [(">", 0), ("<=", 10**4)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])

COMPARISONS = {">": "above", ">=": "of at least", "<": "below", "<=": "at most"}


def describe_range(kind: Any) -> str | None:
    """The numbers of a restricted type in words, such as "a whole number above 0"; None for any other type."""
    if not (expression := getattr(kind, "_expression", "")):  # jsonargparse's own text, such as "v>0 and v<1"
        return None
    limits = re.findall(r"v([<>]=?)(\S+)", expression)
    texts = [f"{COMPARISONS[sign]} {float(limit):,.15g}" for sign, limit in limits if limit != "inf"]
    finite = "a finite number" if len(texts) < len(limits) else "a number"
    return f"{'a whole number' if issubclass(kind, int) else finite} {' and '.join(texts)}"


def check_ranges(config: Any, group: str) -> None:
    """Checks the fields of a dataclass, whose options are those of `group`, and makes plain numbers of them.

    What the parser makes is of the restricted type itself, which a checkpoint of plain values cannot hold.

    Raises:
        UserError: For the first field that is out of its range.
    """
    for name, kind in get_type_hints(type(config)).items():
        value, members = getattr(config, name), get_args(kind) or (kind,)
        restricted = next((member for member in members if describe_range(member)), None)
        if restricted is None or (value is None and NoneType in members):
            continue
        try:
            number = restricted(value)
        except ValueError:
            problem = f"it must be {describe_range(restricted)}"
            raise UserError(problem, option=f"{group}.{name}", value=value) from None
        # A frozen dataclass forbids an ordinary assignment, in its __post_init__ too.
        object.__setattr__(config, name, int(number) if issubclass(restricted, int) else float(number))
