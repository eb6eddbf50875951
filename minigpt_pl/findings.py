"""What the results of a study say in numbers: its configurations, each over its seeds, and its named comparisons.

The methods are in `statistics`; the words and tables are in `report`, the pictures in `pictures`.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt_pl.plans import FLOORS, STUDY, Study, read_study
from minigpt_pl.results import Result, read
from minigpt_pl.statistics import (
    SEEDS_OF_A_SPREAD,
    Difference,
    Interval,
    block_bootstrap,
    difference,
    spread,
    verdicts,
)


@dataclass(frozen=True)
class Group:
    """The results of one configuration, by seed."""

    name: str
    results: list[Result]

    @cached_property
    def figures(self) -> dict[int, float]:
        """The best check of each seed, in nats per character."""
        return {result.seed: result.summary["best_nats_per_char"] for result in self.results}

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.figures.values())))

    @cached_property
    def spread(self) -> tuple[Interval, float] | None:
        """Mean with interval, and standard deviation; None where the seeds are too few to tell."""
        if len(self.figures) < SEEDS_OF_A_SPREAD:
            return None
        interval, sd = spread(list(self.figures.values()))
        return interval, float(sd)

    @property
    def summaries(self) -> list[dict[str, Any]]:
        return [result.summary for result in self.results]

    def of_summary(self, name: str) -> float:
        """The mean over seeds of a number in summary.json."""
        return float(np.mean([found[name] for found in self.summaries]))

    @property
    def flops(self) -> float:
        """Of the whole training, the mean over seeds."""
        return float(np.mean([found["flops_per_token"] * found["tokens_seen"] for found in self.summaries]))

    @property
    def has_experts(self) -> bool:
        return bool(self.results[0].settings["model"]["init_args"].get("n_experts"))

    def by_character(self) -> NDArray[np.float64]:
        """Nats of each character of the validation part, the mean over seeds; nan where none was scored."""
        rows = [result.scores.by_character() for result in self.results]
        length = min(map(len, rows))
        mean: NDArray[np.float64] = np.mean([row[:length] for row in rows], axis=0)
        return mean


@dataclass(frozen=True)
class Comparison:
    """A named comparison: what the seeds say, what the text says, and a word."""

    name: str
    over_seeds: Difference
    over_text: Interval | None
    verdict: str
    corrected: float


class Findings:
    """All that a results folder says.

    Args:
        folder: docs/results/NAME, or another that `study` has written.

    Raises:
        InputError: If it holds no results.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        found = read(folder)
        self.study: Study = read_study(folder / STUDY)
        names = [name for name in self.study.configurations if any(result.name == name for result in found)]
        self.groups = {name: Group(name, [result for result in found if result.name == name]) for name in names}
        path = folder / FLOORS
        self.floors: dict[str, Any] = json.loads(path.read_text("utf-8")).get("floors", {}) if path.exists() else {}

    def ranked(self) -> list[Group]:
        return sorted(self.groups.values(), key=lambda group: group.mean)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Those that the study has named, in its order."""
        seeds: list[Difference] = []
        texts: list[Interval | None] = []
        for pair in self.study.comparisons:
            a, b = (self.groups.get(name) for name in pair)
            if a is None or b is None:
                seeds.append(difference({}, {}, False))
                texts.append(None)
                continue
            equal = a.results[0].batches() == b.results[0].batches()
            seeds.append(difference(a.figures, b.figures, equal))
            texts.append(over_text(a, b))
        words = verdicts(seeds)
        return [
            Comparison(" - ".join(pair), one, text, word, corrected)
            for pair, one, text, (word, corrected) in zip(self.study.comparisons, seeds, texts, words, strict=True)
        ]


def over_text(a: Group, b: Group) -> Interval | None:
    """The difference on the characters that both have scored; None where they validate on different texts."""
    summaries = [group.results[0].summary for group in (a, b)]
    splits = [[group.results[0].settings["data"][part] for part in ("train_frac", "test_frac")] for group in (a, b)]
    if summaries[0]["data_sha256"] != summaries[1]["data_sha256"] or splits[0] != splits[1]:
        return None
    one, other = a.by_character(), b.by_character()
    length = min(len(one), len(other))
    return block_bootstrap(one[:length] - other[:length])
