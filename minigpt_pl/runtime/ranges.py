"""Types of numbers with a range, which the command line checks while parsing, and a check for those who do not use it.

jsonargparse registers each range once in a process, so all rooms take their types from here.
"""

import math
from collections.abc import Iterator
from typing import Any, get_type_hints

from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

__all__ = ["NonNegativeFloat", "NonNegativeInt", "OpenUnitInterval", "PositiveFloat", "PositiveInt"]

PositiveFinite = restricted_number_type(
    "PositiveFinite", float, [(">", 0), ("<", math.inf)], docstring="float restricted to be >0 and finite"
)
NonNegativeFinite = restricted_number_type(
    "NonNegativeFinite", float, [(">=", 0), ("<", math.inf)], docstring="float restricted to be >=0 and finite"
)
Fraction = restricted_number_type(
    "Fraction", float, [(">=", 0), ("<", 1)], docstring="float restricted to be >=0 and <1"
)
Probability = restricted_number_type(
    "Probability", float, [(">", 0), ("<=", 1)], docstring="float restricted to be >0 and <=1"
)
TokenCount = restricted_number_type(
    "TokenCount", int, [(">", 0), ("<=", 10**7)], docstring="int restricted to be >0 and <=10,000,000"
)
SampleCount = restricted_number_type(
    "SampleCount", int, [(">", 0), ("<=", 10**4)], docstring="int restricted to be >0 and <=10,000"
)
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)], docstring="int restricted to be >=0 and <2^32")


def range_errors(config: Any) -> Iterator[tuple[str, Any, str]]:
    """Name, value and problem of each field of a dataclass that is outside the range of its type.

    The other fields become plain numbers: what the parser makes is of the type itself, and no checkpoint may hold that.
    """
    for name, kind in get_type_hints(type(config)).items():
        if isinstance(kind, type) and issubclass(kind, (int, float)) and kind not in (int, float, bool):
            plain = int if issubclass(kind, int) else float
            try:
                object.__setattr__(config, name, plain(kind(getattr(config, name))))
            except ValueError:
                yield name, getattr(config, name), f"expected {kind.__doc__}"
