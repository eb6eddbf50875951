"""Two runs compared without a study: their settings, their metrics, and the difference over the validation text.

How a run is scored is in `results`, the interval in `statistics`; what seeds can tell needs a study.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_pl.cli.options import as_text, config_diff, flatten, option_name
from minigpt_pl.experiments.analysis import difference_by_character
from minigpt_pl.experiments.results import LOGGERS, Result, TokenNLL, load_best, score
from minigpt_pl.experiments.statistics import BLOCK_CHARACTERS, LEVEL, MIN_BLOCKS, block_bootstrap
from minigpt_pl.experiments.tables import align, format_interval
from minigpt_pl.runtime.atomic_io import SUMMARY_FILE
from minigpt_pl.runtime.errors import UserError

CAUTION = """\
The interval is for another text of this kind with these two models. Another seed can change the difference as much: a
study (minigpt study) compares several."""


@dataclass(frozen=True)
class StoredRun:
    """A run directory, read."""

    path: Path
    result: Result
    token_nll: TokenNLL

    @classmethod
    def read(cls, path: Path) -> "StoredRun":
        """Reads a run that has ended or was stopped, and scores its best model on the validation text.

        Raises:
            UserError: If the directory lacks its summary or its best checkpoint, or the text has changed or is gone.
        """
        if not (path / SUMMARY_FILE).is_file():
            remedy = "wait until the run ends, or stop it: then it writes one"
            raise UserError(f"report {path}: it holds no {SUMMARY_FILE}", remedy=remedy)
        summary = json.loads((path / SUMMARY_FILE).read_text("utf-8"))
        config = summary.pop("config")
        nll = score(*load_best(path), seed=config["seed_everything"])
        return cls(path, Result(str(path), config["seed_everything"], "", "", config, summary, "", []), nll)


def compare_runs(paths: list[Path]) -> str:
    """The comparison of two run directories, for a terminal.

    Raises:
        UserError: As `StoredRun.read`.
    """
    one, other = map(StoredRun.read, paths)
    heads = [str(one.path), str(other.path)]
    return "\n".join(
        [
            *_table("Settings that differ", heads, setting_differences(one.result.config, other.result.config)),
            *_table("Metrics that differ", heads, metric_differences(one.result.summary, other.result.summary)),
            f"The difference of their best models over the validation text, {heads[0]} - {heads[1]}:",
            *text_difference(one, other),
        ]
    )


def _table(title: str, heads: list[str], rows: list[tuple[str, Any, Any]]) -> list[str]:
    if not rows:
        return [f"{title}: none", ""]
    cells = [[title, *heads], *([name, *map(_format, values)] for name, *values in rows)]
    return [*align(cells), ""]


def _format(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else as_text(value)


def setting_differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The options in which two configurations differ, with both values.

    An option that only one of them has, since it is newer, is no difference while it has its default value.
    """
    known_back = {name for name, *_ in config_diff(other, one)}
    rows = [(option_name(name), a, b) for name, a, b in config_diff(one, other) if name in known_back]
    return [row for row in rows if not row[0].startswith(LOGGERS)]


def metric_differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The entries in which two summaries differ, with both values; hashes are shortened."""
    a, b = (
        {name: value[:16] if name.endswith("sha256") else value for name, value in flatten(summary)}
        for summary in (one, other)
    )
    return [(name, a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)]


def text_difference(one: StoredRun, other: StoredRun) -> list[str]:
    """The paired difference in nats per character with its interval, or why there is none."""
    texts = [run.result.text_protocol() for run in (one, other)]
    if texts[0][0] != texts[1][0]:
        return ["  none: the runs have different texts, and each was evaluated on its own"]
    if texts[0] != texts[1]:
        return ["  none: the runs split the text differently, and one may have trained on what the other is tested on"]
    values = difference_by_character(one.token_nll, other.token_nll)
    count = int((~np.isnan(values)).sum())
    if not count:
        return ["  none: the runs were scored on different parts of a long text"]
    lines = [f"  mean           {np.nanmean(values):+.4f} nats per character, over {count:,} characters"]
    if (interval := block_bootstrap(values)) is None:
        return [*lines, f"  no interval    it needs {MIN_BLOCKS * BLOCK_CHARACTERS:,} characters"]
    side = "contains 0: no difference found"
    if interval.low > 0 or interval.high < 0:
        better = one if interval.high < 0 else other
        side = f"does not contain 0: {better.path} is better on this text"
    return [*lines, f"  {LEVEL:.0%} interval   {format_interval(interval, '+')}; it {side}", CAUTION]
