"""What the results of a study say in numbers: its configurations, each over its seeds, and its named comparisons.

The methods are in `statistics`; the words and tables are in `report`, the pictures in `pictures`.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt_pl.experiments.results import Result, read
from minigpt_pl.experiments.spec import BASELINES_FILE, FAILED_FILE, STUDY_FILE, Study, read_study
from minigpt_pl.experiments.statistics import (
    MIN_SEEDS_INTERVAL,
    Interval,
    PairwiseTest,
    block_bootstrap,
    compare,
    conclude,
    mean_ci,
)
from minigpt_pl.runtime.errors import UserError


@dataclass(frozen=True)
class VariantResults:
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
        if len(self.figures) < MIN_SEEDS_INTERVAL:
            return None
        interval, sd = mean_ci(list(self.figures.values()))
        return interval, float(sd)

    @property
    def summaries(self) -> list[dict[str, Any]]:
        return [result.summary for result in self.results]

    def of_summary(self, name: str) -> float:
        """The mean over seeds of a number in summary.json."""
        return float(np.mean([found[name] for found in self.summaries]))

    @property
    def minutes(self) -> float:
        """Of training, the median over seeds: other programs may have slowed one of them."""
        return float(np.median([result.minutes for result in self.results]))

    @property
    def characters(self) -> float:
        """Trained on, some of them many times: tokens by the characters that one has in the validation part."""
        rows = [result.summary["tokens_seen"] * result.characters_a_token for result in self.results]
        return float(np.mean(rows))

    @property
    def flops(self) -> float:
        """Of the whole training, the mean over seeds."""
        return float(np.mean([found["flops_per_token"] * found["tokens_seen"] for found in self.summaries]))

    @property
    def sampling_error(self) -> float:
        """What a check by `eval_iters` random batches would have scattered by (SD), the mean over seeds."""
        data = [result.settings["data"] for result in self.results]
        windows = [found["eval_iters"] * found["batch_size"] for found in data]
        return float(np.mean([r.scores.sampling_error(n) for r, n in zip(self.results, windows, strict=True)]))

    @property
    def tokenizer(self) -> str:
        return str(self.summaries[0]["tokenizer_sha256"])

    @property
    def has_experts(self) -> bool:
        return bool(self.results[0].settings["model"]["init_args"].get("n_experts"))

    def by_character(self, seeds: Collection[int]) -> NDArray[np.float64]:
        """Nats of each character of the validation part, the mean over these seeds; nan where none was scored."""
        rows = [result.scores.by_character() for result in self.results if result.seed in seeds]
        length = min(map(len, rows))
        mean: NDArray[np.float64] = np.mean([row[:length] for row in rows], axis=0)
        return mean


@dataclass(frozen=True)
class Comparison:
    """A named comparison: what the seeds say, what the text says, and a word."""

    pair: tuple[str, str]
    over_seeds: PairwiseTest
    over_text: Interval | None
    verdict: str
    corrected: float

    @property
    def name(self) -> str:
        return " - ".join(self.pair)


class StudyAnalysis:
    """All that a results folder says.

    Args:
        folder: docs/results/NAME, or another that `study` has written.

    Raises:
        InputError: If it holds no results of its study.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        found = read(folder)
        self.study: Study = read_study(folder / STUDY_FILE)
        names = [name for name in self.study.configurations if any(result.name == name for result in found)]
        self.groups = {
            name: VariantResults(name, [result for result in found if result.name == name]) for name in names
        }
        if not names:
            raise UserError(f"{folder}: none of its results are of a run that its {STUDY_FILE} names")
        self.others = sorted({result.name for result in found} - set(names))
        """Configurations that have results but are not in the study."""
        self.failed: dict[str, str] = read_json(folder / FAILED_FILE)
        """Why each run failed that has failed and not succeeded since."""
        of, stored = self.groups[names[0]].results[0], read_json(folder / BASELINES_FILE)
        same = stored.get("data_sha256") == of.summary["data_sha256"] and all(
            stored[part] == of.settings["data"][part] for part in ("train_frac", "test_frac")
        )
        self.baselines: dict[str, Any] = stored["baselines"] if same else {}
        """Of the text of the first configuration."""

    def ranked(self) -> list[VariantResults]:
        return sorted(self.groups.values(), key=lambda group: group.mean)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Those that the study has named, in its order."""
        pairs = [(self.group(one), self.group(other)) for one, other in self.study.comparisons]
        seeds = [compare_seeds(*pair) for pair in pairs]
        return [
            Comparison((a.name, b.name), found, compare_text(a, b, found), word, corrected)
            for (a, b), found, (word, corrected) in zip(pairs, seeds, conclude(seeds), strict=True)
        ]

    def group(self, name: str) -> VariantResults:
        """Of a configuration; without results where none has been run."""
        return self.groups.get(name, VariantResults(name, []))


def read_json(path: Path) -> dict[str, Any]:
    """What a study has written in a file; {} where there is none."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def compare_seeds(a: VariantResults, b: VariantResults) -> PairwiseTest:
    """The difference between two configurations, in pairs where they saw the same batches."""
    if not (a.results and b.results):
        return compare(a.figures, b.figures, False)
    one, other = a.results[0], b.results[0]
    if one.scored_text() != other.scored_text():
        return PairwiseTest(False, (len(a.figures), len(b.figures)), None, 1.0, None)
    return compare(a.figures, b.figures, one.batches() == other.batches())


def compare_text(a: VariantResults, b: VariantResults, found: PairwiseTest) -> Interval | None:
    """The same difference, of the same seeds, on the characters that both have scored."""
    if found.interval is None:
        return None
    common = a.figures.keys() & b.figures.keys()
    one, other = (group.by_character(common if found.is_paired else group.figures) for group in (a, b))
    length = min(len(one), len(other))
    return block_bootstrap(one[:length] - other[:length])
