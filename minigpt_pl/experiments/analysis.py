"""The numbers of a study: its variants, each over its seeds, and its named comparisons.

The statistical methods are in `statistics`, tables and text in `report`, drawings in `plots`.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_pl.experiments.results import Result, TokenNLL, read_results, read_token_nll
from minigpt_pl.experiments.spec import BASELINES_FILE, FAILED_FILE, STUDY_FILE, read_study
from minigpt_pl.experiments.statistics import (
    MIN_SEEDS_INTERVAL,
    Interval,
    PairwiseTest,
    block_bootstrap,
    compare,
    conclude,
    mean_ci,
)
from minigpt_pl.runtime.atomic_io import atomic_write
from minigpt_pl.runtime.errors import UserError


@dataclass(frozen=True)
class VariantResults:
    """The results of one variant, by seed; [] and None if it was not run."""

    name: str
    results: list[Result]
    token_nll: TokenNLL

    @cached_property
    def losses(self) -> dict[int, float]:
        """The best evaluation of each seed, in nats per character."""
        return {result.seed: result.summary["best_nats_per_char"] for result in self.results}

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.losses.values())))

    @cached_property
    def spread(self) -> tuple[Interval, float] | None:
        """Mean with interval, and standard deviation; None with fewer than MIN_SEEDS_INTERVAL seeds."""
        if len(self.losses) < MIN_SEEDS_INTERVAL:
            return None
        interval, sd = mean_ci(list(self.losses.values()))
        return interval, float(sd)

    def summary_mean(self, name: str) -> float:
        """The mean over seeds of a number in the summaries."""
        return float(np.mean([result.summary[name] for result in self.results]))

    @property
    def minutes(self) -> float:
        """Training time, the median over seeds: other programs may have slowed one of them."""
        return float(np.median([result.minutes for result in self.results]))

    @property
    def characters(self) -> float:
        """Characters trained on, with repetitions; a token counts as many as one of the validation split has."""
        return self.summary_mean("tokens_seen") * self.token_nll.chars_per_token

    @property
    def flops(self) -> float:
        """Of the whole training, the mean over seeds."""
        return float(np.mean([r.summary["flops_per_token"] * r.summary["tokens_seen"] for r in self.results]))

    @property
    def sampling_error(self) -> float:
        """SD of an evaluation on `eval_iters` random batches, in nats per character; nan for a text of one window."""
        windows = [r.config["data"]["eval_iters"] * r.config["data"]["batch_size"] for r in self.results]
        spreads = np.array([r.summary["window_sd"] for r in self.results], float)
        return float(np.mean(spreads / np.sqrt(windows)))

    @property
    def tokenizer(self) -> str:
        return str(self.results[0].summary["tokenizer_sha256"])

    @property
    def has_experts(self) -> bool:
        return bool(self.results[0].config["model"]["init_args"].get("n_experts"))


@dataclass(frozen=True)
class Comparison:
    """A named comparison of two variants: the first minus the second."""

    pair: tuple[str, str]
    test: PairwiseTest
    over_text: Interval | None
    conclusion: str
    corrected_p: float

    @property
    def name(self) -> str:
        return " - ".join(self.pair)


class StudyAnalysis:
    """All that the report of a study shows.

    Args:
        folder: docs/results/NAME, or another directory that `study` has written.

    Raises:
        UserError: If it holds no complete results of its study.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.study = read_study(folder / STUDY_FILE)
        results, token_nll = read_results(folder), read_token_nll(folder)
        groups = {name: [one for one in results if one.name == name] for name in self.study.variants}
        self.groups = {n: VariantResults(n, group, token_nll[n]) for n, group in groups.items() if group}
        if not self.groups:
            raise UserError(f"{folder} holds no results of its study", remedy=f"run minigpt study, with --out {folder}")
        for name, group in self.groups.items():
            if set(group.token_nll.seeds.tolist()) != group.losses.keys():
                problem = f"{folder} holds token losses of other seeds of {name} than results"
                raise UserError(problem, remedy="run the study again, which completes them")
        self.unnamed = sorted({result.name for result in results} - self.groups.keys())
        """Variants that have results but are not in the study."""
        self.failed: dict[str, str] = read_json(folder / FAILED_FILE)
        """The reason of each run that failed and has no results since."""
        first, stored = next(iter(self.groups.values())).results[0], read_json(folder / BASELINES_FILE)
        same_text = stored.get("data_sha256") == first.summary["data_sha256"] and all(
            stored[name] == first.config["data"][name] for name in ("train_frac", "test_frac")
        )
        self.baselines: dict[str, Any] = stored["baselines"] if same_text else {}
        """Of the text of the first variant."""

    def ranked(self) -> list[VariantResults]:
        return sorted(self.groups.values(), key=lambda group: group.mean)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The named comparisons, in the study's order."""
        names = self.study.comparisons
        tests = [compare_seeds(self.groups.get(a), self.groups.get(b)) for a, b in names]
        texts = [self.compare_text(pair, test) for pair, test in zip(names, tests, strict=True)]
        return [
            Comparison(pair, test, text, conclusion, corrected)
            for pair, test, text, (conclusion, corrected) in zip(names, tests, texts, conclude(tests), strict=True)
        ]

    def compare_text(self, pair: tuple[str, str], test: PairwiseTest) -> Interval | None:
        """The difference on the characters that both have scored, for the same seeds as in the test.

        None if that is impossible: pairs need the same seeds on both sides, since only sums over seeds are stored.
        """
        if test.interval is None:
            return None
        one, other = (self.groups[name] for name in pair)
        if test.is_paired and one.losses.keys() != other.losses.keys():
            return None
        a, b = one.token_nll.by_character(), other.token_nll.by_character()
        length = min(len(a), len(b))
        return block_bootstrap(a[:length] - b[:length])


def compare_seeds(a: VariantResults | None, b: VariantResults | None) -> PairwiseTest:
    """The difference between two variants over seeds, in pairs if equal seeds gave them the same batches."""
    seeds = len(a.losses) if a else 0, len(b.losses) if b else 0
    if a is None or b is None or a.results[0].eval_protocol() != b.results[0].eval_protocol():
        return PairwiseTest(False, seeds)
    return compare(a.losses, b.losses, a.results[0].batch_protocol() == b.results[0].batch_protocol())


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file; {} if there is no file."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file, or removes it if the content is empty."""
    if content:
        atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())
    else:
        path.unlink(missing_ok=True)
