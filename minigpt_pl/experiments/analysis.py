"""The numbers of a study: its variants, each over its seeds, and its named comparisons.

The statistical methods are in `statistics`, tables and text in `report`, drawings in `plots`.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_pl.experiments import statistics
from minigpt_pl.experiments.results import Result, TokenNLL, read_results, read_token_nll
from minigpt_pl.experiments.spec import BASELINES_FILE, FAILED_FILE, STUDY_FILE, read_study
from minigpt_pl.experiments.statistics import Interval, PairwiseTest
from minigpt_pl.runtime.atomic_io import atomic_write
from minigpt_pl.runtime.errors import UserError


@dataclass(frozen=True)
class VariantResults:
    """The results of one variant, by seed."""

    name: str
    results: list[Result]
    token_nll: TokenNLL

    @cached_property
    def losses(self) -> dict[int, float]:
        """The best evaluation of each seed, in nats per character."""
        return {result.seed: result.summary["best_nats_per_char"] for result in self.results}

    @property
    def mean(self) -> float:
        return float(np.mean([*self.losses.values()]))

    @cached_property
    def spread(self) -> tuple[Interval, float] | None:
        """Mean with interval, and standard deviation; None with fewer than statistics.MIN_SEEDS_INTERVAL seeds."""
        if len(self.losses) < statistics.MIN_SEEDS_INTERVAL:
            return None
        interval, sd = statistics.mean_ci([*self.losses.values()])
        return interval, float(sd)

    def summary_mean(self, name: str) -> float:
        """The mean over seeds of a number in the summaries."""
        return float(np.mean([result.summary[name] for result in self.results]))

    def has(self, name: str) -> bool:
        """Whether that number is in all summaries; older results lack some."""
        return all(name in result.summary for result in self.results)

    @cached_property
    def sizes(self) -> dict[str, float]:
        """Parameters and training budget, means over seeds; a token has the mean length of validation tokens."""
        return {
            "total": self.summary_mean("params_total"),
            "active": self.summary_mean("params_active"),
            "characters": self.summary_mean("tokens_seen") * self.token_nll.chars_per_token,
            "FLOPs": float(np.mean([r.summary["flops_per_token"] * r.summary["tokens_seen"] for r in self.results])),
        }

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
    """A named comparison: the first variant minus the second. A variant without results is None."""

    name: str
    first: VariantResults | None
    second: VariantResults | None
    test: PairwiseTest
    over_text: Interval | None
    conclusion: str
    corrected_p: float


class StudyAnalysis:
    """All that the report of a study shows, from its results folder.

    Raises:
        UserError: If the folder holds no complete results of its study.
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
        self.unnamed = sorted({result.name for result in results} - self.groups.keys())  # not in the study
        self.failed: dict[str, str] = read_json(folder / FAILED_FILE)  # reasons, by run
        first, stored = next(iter(self.groups.values())).results[0], read_json(folder / BASELINES_FILE)
        basis = stored.get("split_basis", "characters")  # older files lack it
        same_text = (stored.get("data_sha256"), basis) == (first.summary["data_sha256"], first.split_basis) and all(
            stored[name] == first.config["data"][name] for name in ("train_frac", "test_frac")
        )
        self.baselines: dict[str, Any] = stored["baselines"] if same_text else {}

    def ranked(self) -> list[VariantResults]:
        return sorted(self.groups.values(), key=lambda group: group.mean)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The named comparisons, in the study's order."""
        pairs = [(self.groups.get(first), self.groups.get(second)) for first, second in self.study.comparisons]
        tests = [compare_variants(*pair) for pair in pairs]
        names, conclusions = map(" - ".join, self.study.comparisons), statistics.conclude([test for test, _ in tests])
        rows = zip(names, pairs, tests, conclusions, strict=True)
        return [Comparison(name, *pair, *test, *conclusion) for name, pair, test, conclusion in rows]


def compare_variants(a: VariantResults | None, b: VariantResults | None) -> tuple[PairwiseTest, Interval | None]:
    """The difference between two variants over seeds, and of the same seeds over text.

    The latter is None for pairs that lack a seed on one side, since only sums over seeds are stored.
    """
    seeds = len(a.losses) if a else 0, len(b.losses) if b else 0
    if a is None or b is None or a.results[0].eval_protocol() != b.results[0].eval_protocol():
        return PairwiseTest(False, seeds), None
    test = statistics.compare(a.losses, b.losses, a.results[0].batch_protocol() == b.results[0].batch_protocol())
    if test.interval is None or test.is_paired and a.losses.keys() != b.losses.keys():
        return test, None
    return test, statistics.block_bootstrap(difference_by_character(a.token_nll, b.token_nll))


def difference_by_character(a: TokenNLL, b: TokenNLL) -> statistics.Values:
    """The first minus the second, in nats of each character of one text; nan where one of them was not scored."""
    x, y = a.by_character(), b.by_character()
    length = min(len(x), len(y))
    return x[:length] - y[:length]


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
