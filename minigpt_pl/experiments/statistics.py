"""What a few seeds can tell: intervals, differences, the correction for several of them, and when nothing can be told.

Numbers in, numbers out: runs and their files are in `results`, words and tables in `report`. Values lie along the last
axis, so that many studies are analysed at once; scipy is imported where it is needed, since only a study needs it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
"""Of every interval; a p-value below 1 - LEVEL is a finding."""
MIN_SEEDS_INTERVAL = 3
"""Below it nothing is said of how one configuration spreads."""
MIN_SEEDS_COMPARISON = 8
"""Below it, in either configuration, nothing is said of a difference: sign flips then cannot reach 1 - LEVEL after
Holm's correction over MOST_COMPARISONS."""
MAX_COMPARISONS = 6
MAX_SIGN_FLIPS = 16
BLOCK_CHARACTERS = 500
"""Characters of text that stay together in the bootstrap: neighbours are hard, or easy, together."""
MIN_BLOCKS = 10
"""Of which other texts can be put together."""

Values = NDArray[np.float64]
Test = Callable[[ArrayLike, ArrayLike], tuple["Interval", Values]]


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: Values
    low: Values
    high: Values


def mean_ci(values: ArrayLike) -> tuple[Interval, Values]:
    """The mean (...,) over seeds of values (..., n) with its t interval, and the standard deviation."""
    from scipy import stats

    values = np.asarray(values, float)
    n, mean, sd = values.shape[-1], values.mean(-1), values.std(-1, ddof=1)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * sd / np.sqrt(n)
    return Interval(mean, mean - half, mean + half), sd


def paired(a: ArrayLike, b: ArrayLike) -> tuple[Interval, Values]:
    """The mean of a - b (..., n), of which each pair shares its batches, with its t interval and two-sided p."""
    from scipy import stats

    a, b = np.asarray(a, float), np.asarray(b, float)
    test = stats.ttest_rel(a, b, axis=-1)
    low, high = test.confidence_interval(LEVEL)
    return Interval((a - b).mean(-1), low, high), test.pvalue


def unpaired(a: ArrayLike, b: ArrayLike) -> tuple[Interval, Values]:
    """The difference of the means of a (..., n) and b (..., m), with interval and p by Welch (Biometrika 34, 1947)."""
    from scipy import stats

    a, b = np.asarray(a, float), np.asarray(b, float)
    test = stats.ttest_ind(a, b, axis=-1, equal_var=False)
    low, high = test.confidence_interval(LEVEL)
    return Interval(a.mean(-1) - b.mean(-1), low, high), test.pvalue


def holm(p: ArrayLike) -> Values:
    """p-values (..., m) of m comparisons, corrected so that one false finding among them is rare (Holm 1979)."""
    p = np.asarray(p, float)
    order, m = p.argsort(-1), p.shape[-1]
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, -1) * np.arange(m, 0, -1), -1).clip(max=1)
    corrected = np.empty_like(p)
    np.put_along_axis(corrected, order, stepped, -1)
    return corrected


def sign_flip(differences: ArrayLike) -> tuple[float, float]:
    """Two-sided p of differences (n,) when each sign is as likely, all 2^n counted; and the smallest that n allows."""
    found = np.asarray(differences, float)
    n = len(found)
    assert n <= MAX_SIGN_FLIPS, "2^n are counted"
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    sums = np.abs(signs @ found)
    return float(np.mean(sums >= sums[0] * (1 - 1e-12))), 2.0 ** (1 - n)


def block_bootstrap(values: Values, block: int = BLOCK_CHARACTERS, draws: int = 5000, seed: int = 0) -> Interval | None:
    """The mean of values along a text, with the interval that another text of this length and kind would give it.

    None for a text of fewer than FEWEST_BLOCKS blocks, which says nothing of others.

    Args:
        values: One for each character (n,), in order; nan where there is none.
        block: Neighbours that are drawn together, from a circle (Politis & Romano 1992).
        draws: Texts that are put together.
        seed: Of the draws.
    """
    known = values[~np.isnan(values)].astype(float)
    n = len(known)
    if n < MIN_BLOCKS * block:
        return None
    around = np.concatenate([[0.0], np.cumsum(np.concatenate([known, known[: block - 1]]))])
    sums = around[block:] - around[:-block]  # of each block, by its start (n,)
    starts = np.random.default_rng(seed).integers(0, n, (draws, round(n / block)))
    means = sums[starts].mean(1) / block
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(known.mean(), low, high)


@dataclass(frozen=True)
class PairwiseTest:
    """One configuration less another, over their seeds."""

    is_paired: bool
    """Over equal seeds; else over two groups."""
    seeds: tuple[int, int]
    """How many of each took part."""
    interval: Interval | None
    """None with fewer than two seeds."""
    p: float
    """Of the t test; 1 where there is none."""
    flips: tuple[float, float] | None
    """`sign_flip`, where paired."""

    @property
    def has_enough(self) -> bool:
        return min(self.seeds) >= MIN_SEEDS_COMPARISON


def compare(a: Mapping[int, float], b: Mapping[int, float], equal_batches: bool) -> PairwiseTest:
    """Compares two configurations.

    Args:
        a: A figure by seed.
        b: The same of the other one.
        equal_batches: Whether a seed gives both the same batches, as equal tokenizer, block_size and batch_size do:
            only then are equal seeds pairs.
    """
    common = sorted(a.keys() & b.keys())
    if equal_batches and len(common) > 1:
        one, other = [a[seed] for seed in common], [b[seed] for seed in common]
        interval, p = run_test(paired, one, other)
        flips = sign_flip(np.subtract(one, other)) if len(common) <= MAX_SIGN_FLIPS else None
        return PairwiseTest(True, (len(common), len(common)), interval, p, flips)
    seeds = len(a), len(b)
    if min(seeds) < 2:
        return PairwiseTest(False, seeds, None, 1.0, None)
    interval, p = run_test(unpaired, list(a.values()), list(b.values()))
    return PairwiseTest(False, seeds, interval, p, None)


def run_test(test: Test, a: list[float], b: list[float]) -> tuple[Interval, float]:
    """What a test says of two configurations; of equal figures, of which it says nan, that they are equal."""
    if np.ptp([*a, *b]) == 0 or test is paired and a == b:
        return Interval(np.zeros(()), np.zeros(()), np.zeros(())), 1.0
    interval, p = test(a, b)
    return interval, float(p)


def conclude(differences: list[PairwiseTest]) -> list[tuple[str, float]]:
    """In a word for each named comparison, lower, higher, no difference found or cannot tell; and the corrected p.

    Comparisons that were not run count in the correction like those that were: all were named.
    """
    corrected = holm([found.p if found.has_enough else 1.0 for found in differences])
    return [(_word(found, p), float(p)) for found, p in zip(differences, corrected, strict=True)]


def _word(found: PairwiseTest, p: float) -> str:
    if not found.has_enough or found.interval is None:
        return "cannot tell"
    if p >= 1 - LEVEL:
        return "no difference found"
    return "lower" if found.interval.mean < 0 else "higher"
