"""What earlier starts of a run have left beside its checkpoints: read again, or set aside where it cannot be read.

A run resumes from last.ckpt; these files may have been opened, changed or cut short by anything. Who writes them is in
`loggers`, `sampling` and `summary`.
"""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from minigpt_pl.checkpoint.run_dir import set_aside
from minigpt_pl.runtime.errors import one_line, rank_zero_print

Content = TypeVar("Content")
SAMPLE_HEADER = "=== step "
"""Before each sample in samples.txt, with the step."""
UNREADABLE = (OSError, ValueError, csv.Error)


def read_or_set_aside(path: Path, read: Callable[[Path], Content], otherwise: Content) -> Content:
    """What `read` finds in a file; after an error of UNREADABLE the file is moved away, and a line says so."""
    if not path.exists():
        return otherwise
    try:
        return read(path)
    except UNREADABLE as error:
        rank_zero_print(
            f"{path} cannot be read ({one_line(error)}): moved to {set_aside([path])}, and the run continues"
        )
        return otherwise


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of metrics.csv. A last row that a crash has cut short is left out.

    Raises:
        ValueError: If the file is not as it was written, except for a byte-order mark.
    """
    text = path.read_bytes().decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns, rows = list(reader.fieldnames or ()), list(reader)
    if not {"step", "split"} <= set(columns):
        raise ValueError("it has no columns step and split, separated by commas")
    if rows and not text.endswith("\n"):
        rows.pop()
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values() or row["split"] not in ("train", "val"):
            raise ValueError(f"row {number} is not whole")
        int(row["step"])
        for name in set(columns) - {"step", "split"}:
            float(row[name] or 0)
    return columns, rows


def format_sample(step: int, text: str) -> str:
    return f"{SAMPLE_HEADER}{step}\n{text}\n"


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Step and text of each sample in samples.txt, including those from before a resume."""
    # As bytes, which keeps other line ends.
    return split_samples(path.read_bytes().decode("utf-8", "replace") if path.exists() else "")


def split_samples(content: str) -> list[tuple[int, str]]:
    _, *fields = re.split(rf"^{SAMPLE_HEADER}(\d+)\n", content, flags=re.MULTILINE)
    return [(int(step), text.removesuffix("\n")) for step, text in zip(fields[::2], fields[1::2], strict=True)]


def read_whole_samples(path: Path) -> list[tuple[int, str]]:
    """Step and text of each whole sample in samples.txt; a file with anything else is set aside, and said."""
    content = path.read_bytes()
    try:
        text, whole = content.decode("utf-8-sig"), content.endswith(b"\n") or not content
    except UnicodeDecodeError as error:
        text, whole = content[: error.start].decode("utf-8-sig"), False
    if whole and (not text or re.match(rf"{SAMPLE_HEADER}\d+\n", text)):
        return split_samples(text)
    rank_zero_print(f"{path} is not whole: moved to {set_aside([path])}, and the run continues")
    last = text.rfind(f"\n{SAMPLE_HEADER}")  # of the sample that was cut short
    return split_samples(text if whole else text[: last + 1])


def read_summary(path: Path) -> dict[str, Any] | None:
    """A summary.json as RunSummary wrote it; None where there is none, or it is something else by now."""
    try:
        summary = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(summary, dict) and summary.keys() >= {"total_steps", "stop_reason"}
    return summary if known else None
