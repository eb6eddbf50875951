"""Numbers and tables as text: in Markdown for a report, aligned for a terminal. Nothing is computed here."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from minigpt_pl.experiments.statistics import Interval

Columns = dict[str, Callable[[Any], Any]]  # of a table: the head, and what it shows of the item in a row


def render_table(columns: Columns, items: Iterable[Any]) -> Iterator[str]:
    """The lines of a table with a row for each item; all columns but the first are aligned to the right."""
    yield f"| {' | '.join(columns)} |"
    yield "|---|" + "--:|" * (len(columns) - 1)
    for item in items:
        yield f"| {' | '.join(str(cell(item)) for cell in columns.values())} |"


def align(rows: list[list[str]]) -> list[str]:
    """A line for each row, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def format_interval(interval: Interval | None, sign: str = "") -> str:
    return "" if interval is None else f"{interval.low:{sign}.4f} ... {interval.high:{sign}.4f}"


def format_large(number: float) -> str:
    """A large number with three digits, such as 1.11 M."""
    number = float(f"{number:.3g}")
    power = max(0, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.3g}{['', ' k', ' M', ' G', ' T', ' P', ' E'][power]}"


def format_p(p: float) -> str:
    return f"{p:.4f}" if p >= 0.00005 else "< 0.0001"
