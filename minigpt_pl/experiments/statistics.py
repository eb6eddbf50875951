"""What a few seeds can tell: intervals, differences between variants, and the correction for several comparisons.

Only numbers are handled here: `analysis` takes them from the results of a study, `report` prints them. Values lie along
the last axis, so that many studies can be analysed at once. scipy is imported inside the functions, since only a study
needs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
LEVEL = 0.95  # of every interval; a p-value below 1 - LEVEL counts as a difference
MIN_SEEDS_INTERVAL = 3
MIN_SEEDS_COMPARISON = 8  # with fewer, sign flips cannot reach 1 - LEVEL after Holm's correction for MAX_COMPARISONS
MAX_COMPARISONS = 6
MAX_SIGN_FLIPS = 16
BLOCK_CHARACTERS = 500  # stay together in the bootstrap: neighbouring characters are similarly hard to predict
MIN_BLOCKS = 10


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: Values
    low: Values
    high: Values


def mean_ci(values: ArrayLike) -> tuple[Interval, Values]:
    """The mean (...,) of values (..., n) with its t interval, and the standard deviation."""
    from scipy import stats

    values = np.asarray(values, float)
    n, mean, sd = values.shape[-1], values.mean(-1), values.std(-1, ddof=1)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * sd / np.sqrt(n)
    return Interval(mean, mean - half, mean + half), sd


def t_test(a: ArrayLike, b: ArrayLike, paired: bool) -> tuple[Interval, Values]:
    """The difference of the means of a (..., n) and b (..., m) with its t interval, and the two-sided p-value.

    If they are paired, a[..., i] and b[..., i] belong together; else it is Welch's test (Biometrika 34, 1947).
    """
    from scipy import stats

    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim == b.ndim == 1 and (paired and np.array_equal(a, b) or np.ptp([*a, *b]) == 0):
        return Interval(np.zeros(()), np.zeros(()), np.zeros(())), np.ones(())  # scipy's p would be nan
    test = stats.ttest_rel(a, b, axis=-1) if paired else stats.ttest_ind(a, b, axis=-1, equal_var=False)
    low, high = test.confidence_interval(LEVEL)
    return Interval((a - b).mean(-1) if paired else a.mean(-1) - b.mean(-1), low, high), test.pvalue


def holm(p: ArrayLike) -> Values:
    """p-values (..., m) of m comparisons, corrected for a familywise error rate (Holm 1979)."""
    p = np.asarray(p, float)
    order, m = p.argsort(-1), p.shape[-1]
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, -1) * np.arange(m, 0, -1), -1).clip(max=1)
    corrected = np.empty_like(p)
    np.put_along_axis(corrected, order, stepped, -1)
    return corrected


def sign_flip(differences: ArrayLike) -> tuple[float, float]:
    """Two-sided p-value of differences (n,) if each sign is equally likely, exact; and the smallest that n allows."""
    from scipy import stats

    values = np.asarray(differences, float)
    test = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=2**MAX_SIGN_FLIPS)
    return float(test.pvalue), 2.0 ** (1 - len(values))


def block_bootstrap(values: Values, block: int = BLOCK_CHARACTERS, draws: int = 5000, seed: int = 0) -> Interval | None:
    """The mean of values along a text (n,), nan where there is none, with the interval for other texts of this kind.

    `block` neighbours are drawn together, from a circle (Politis & Romano 1992). None for a text of fewer than
    MIN_BLOCKS blocks, which is too short for an interval.
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
    """One variant minus another, over their seeds."""

    is_paired: bool
    seeds: tuple[int, int]  # how many of each are compared
    interval: Interval | None = None  # None if one of them has fewer than two seeds
    p: float = 1.0  # of the t test
    flips: tuple[float, float] | None = None  # `sign_flip`, for pairs

    @property
    def has_enough(self) -> bool:
        return min(self.seeds) >= MIN_SEEDS_COMPARISON


def compare(a: Mapping[int, float], b: Mapping[int, float], equal_batches: bool) -> PairwiseTest:
    """Compares the losses of two variants by seed; equal seeds are pairs if they give both the same batches."""
    common = sorted(a.keys() & b.keys())
    paired = equal_batches and len(common) > 1
    one, other = ([x[seed] for seed in common] if paired else list(x.values()) for x in (a, b))
    seeds = len(one), len(other)
    if min(seeds) < 2:
        return PairwiseTest(False, seeds)
    interval, p = t_test(one, other, paired)
    flips = sign_flip(np.subtract(one, other)) if paired and len(common) <= MAX_SIGN_FLIPS else None
    return PairwiseTest(paired, seeds, interval, float(p), flips)


def conclude(tests: list[PairwiseTest]) -> list[tuple[str, float]]:
    """For each named comparison "lower", "higher", "no difference found" or "cannot tell"; and the corrected p-value.

    Comparisons without results count in the correction too, since all were named before.
    """
    corrected = holm([test.p if test.has_enough else 1.0 for test in tests])
    return [(_conclusion(test, p), float(p)) for test, p in zip(tests, corrected, strict=True)]


def _conclusion(test: PairwiseTest, p: float) -> str:
    if not test.has_enough or test.interval is None:
        return "cannot tell"
    if p >= 1 - LEVEL:
        return "no difference found"
    return "lower" if test.interval.mean < 0 else "higher"
