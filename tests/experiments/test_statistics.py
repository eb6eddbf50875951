"""The statistics of a study, tried where the truth is known: false findings, coverage, what a shift of 3 SD does."""

import numpy as np
import pytest

from minigpt_pl.experiments.statistics import (
    BLOCK_CHARACTERS,
    LEVEL,
    MAX_COMPARISONS,
    MIN_BLOCKS,
    MIN_SEEDS_COMPARISON,
    block_bootstrap,
    compare,
    conclude,
    holm,
    mean_ci,
    sign_flip,
    t_test,
)

SEED_SD = 0.0025  # nats, of our default configuration
STUDIES = 2000
N = MIN_SEEDS_COMPARISON


def losses(*shape: int, seed: int) -> np.ndarray:
    return 1.25 + SEED_SD * np.random.default_rng(seed).standard_normal((STUDIES, *shape))


@pytest.mark.parametrize("paired", [True, False])
def test_without_a_difference_one_in_twenty_is_found_and_intervals_cover(paired: bool) -> None:
    interval, p = t_test(losses(N, seed=1), losses(N, seed=2), paired)
    assert np.mean(p < 1 - LEVEL) == pytest.approx(0.05, abs=0.01)
    assert np.mean((interval.low < 0) & (interval.high > 0)) == pytest.approx(0.95, abs=0.01)


def test_pairs_that_share_their_luck_are_compared_without_it() -> None:
    """A seed's batches move both configurations alike: paired, the interval is as wide as what is left."""
    shared, a, b = losses(N, seed=1), losses(N, seed=2), losses(N, seed=3)
    found = t_test(shared + 0.2 * a, shared + 0.2 * b, paired=True)[0]
    apart = t_test(shared + 0.2 * a, shared + 0.2 * b, paired=False)[0]
    assert np.mean((found.low < 0) & (found.high > 0)) == pytest.approx(0.95, abs=0.01)
    assert np.median(found.high - found.low) < 0.35 * np.median(apart.high - apart.low)


def test_groups_of_different_size_and_spread_are_compared_fairly() -> None:
    """Pooling their variances would find something in one case of five."""
    interval, p = t_test(1.25 + 3 * (losses(N, seed=8) - 1.25), losses(3 * N, seed=9), paired=False)
    assert np.mean(p < 1 - LEVEL) == pytest.approx(0.05, abs=0.01)
    assert np.mean((interval.low < 0) & (interval.high > 0)) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_interval_of_a_mean_covers_it(seeds: int) -> None:
    interval, sd = mean_ci(losses(seeds, seed=4))
    assert np.mean((interval.low < 1.25) & (interval.high > 1.25)) == pytest.approx(0.95, abs=0.01)
    assert np.sqrt(np.mean(sd**2)) == pytest.approx(SEED_SD, rel=0.05)


@pytest.mark.parametrize("paired", [True, False])
def test_a_shift_of_three_sd_is_found_even_among_six_comparisons(paired: bool) -> None:
    a, b = losses(MAX_COMPARISONS, N, seed=5), losses(MAX_COMPARISONS, N, seed=6)
    a[:, 0] += 3 * SEED_SD
    uncorrected = t_test(a, b, paired)[1]
    p = holm(uncorrected)
    assert np.mean(p[:, 0] < 1 - LEVEL) > 0.95
    # and among the five without a shift a study finds anything in one case of twenty, not in four
    assert np.mean((p[:, 1:] < 1 - LEVEL).any(1)) < 0.06
    assert np.mean((uncorrected[:, 1:] < 1 - LEVEL).any(1)) > 0.15


def test_holm_is_the_textbook_s() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]


def test_sign_flips_are_counted_and_their_smallest_p_is_known() -> None:
    p, least = sign_flip([0.3, 0.1, 0.2, -0.05, 0.4])
    assert (p, least) == (4 / 2**5, 2 / 2**5)  # only without -0.05's sign the sum is larger, and each way round
    assert sign_flip([1.0] * 5)[0] == least
    assert sign_flip([0.0] * 5)[0] == 1
    # with the seeds that a named comparison gets, flips alone can hold against all corrections
    assert sign_flip([1.0] * N)[1] * MAX_COMPARISONS < 1 - LEVEL <= sign_flip([1.0] * (N - 1))[1] * MAX_COMPARISONS


def test_the_block_bootstrap_covers_where_neighbours_are_alike() -> None:
    """Along a text with hard and easy places, single characters would promise far too much."""
    rng, length, covered = np.random.default_rng(7), 20_000, {BLOCK_CHARACTERS: 0, 1: 0}
    kernel = np.ones(100) / 10  # each value shares its luck with a hundred neighbours
    for draw in range(60):
        text = np.convolve(rng.standard_normal(length + 99), kernel, "valid")
        for block in covered if draw < 15 else (BLOCK_CHARACTERS,):
            interval = block_bootstrap(text, block, draws=200, seed=draw)
            covered[block] += bool(interval.low < 0 < interval.high)
            assert interval.mean == pytest.approx(text.mean())
    assert covered[BLOCK_CHARACTERS] >= 52
    assert covered[1] < 8


def test_blocks_of_the_bootstrap_go_round_the_end_of_the_text() -> None:
    """So that each character is in as many blocks as any other, the first one too."""
    text = np.zeros(MIN_BLOCKS * BLOCK_CHARACTERS)
    text[0] = 1
    interval = block_bootstrap(text, BLOCK_CHARACTERS)
    assert interval is not None
    assert interval.high > 0


def test_characters_that_were_not_scored_are_left_out() -> None:
    values = np.array([np.nan, 1.0, 3.0, np.nan] * 5)
    found = block_bootstrap(values, 1)
    assert found is not None
    assert found.mean == 2


def test_a_text_of_few_blocks_says_nothing_of_others() -> None:
    assert block_bootstrap(np.ones(MIN_BLOCKS * BLOCK_CHARACTERS), BLOCK_CHARACTERS) == (1, 1, 1)
    assert block_bootstrap(np.ones(MIN_BLOCKS * BLOCK_CHARACTERS - 1), BLOCK_CHARACTERS) is None


def test_equal_figures_are_no_difference() -> None:
    """Two configurations that differ in what changes nothing train alike to the bit."""
    figures = {seed: 1 + 0.1 * seed for seed in range(8)}
    same = dict.fromkeys(range(8), 1.25)
    for a, b, pairs in ((figures, figures, True), (same, same, True), (same, same, False)):
        found = compare(a, b, pairs)
        assert (found.p, found.interval) == (1, (0, 0, 0))
        assert conclude([found]) == [("no difference found", 1)]


def test_only_equal_batches_are_paired_and_only_over_equal_seeds() -> None:
    a = {seed: 1.0 + 0.01 * seed for seed in range(9)}
    b = {seed: 1.1 + 0.01 * seed + 0.0001 * (seed % 2) for seed in range(1, 10)}
    found = compare(a, b, equal_batches=True)
    assert (found.is_paired, found.seeds) == (True, (8, 8))
    assert found.interval is not None
    assert found.interval.mean == pytest.approx(-0.10005)
    assert found.flips == (2 / 2**8, 2 / 2**8)
    apart = compare(a, b, equal_batches=False)
    assert (apart.is_paired, apart.seeds, apart.flips) == (False, (9, 9), None)
    assert apart.interval is not None
    assert apart.interval.low < found.interval.low < found.interval.high < apart.interval.high
    fresh = compare(a, {seed + 100: value for seed, value in b.items()}, equal_batches=True)
    assert not fresh.is_paired


def test_with_too_few_seeds_nothing_is_told() -> None:
    def of(seeds: int, shift: float):
        values = dict(enumerate(np.linspace(0, 0.001, seeds)))
        return compare({s: v + shift + 1e-5 * (s % 3) for s, v in values.items()}, values, equal_batches=True)

    many = [of(8, 1.0), of(8, -1.0), of(7, 1.0), of(1, 1.0), of(0, 1.0)]
    assert [word for word, _ in conclude(many)] == ["higher", "lower", "cannot tell", "cannot tell", "cannot tell"]
    assert [p for _, p in conclude(many)][2:] == [1.0, 1.0, 1.0]
    noise = dict(enumerate([0.01, -0.02, 0.03, -0.01, 0.02, -0.03, 0.01, 0.0]))
    assert conclude([compare(noise, dict.fromkeys(range(8), 0.0), True)])[0][0] == "no difference found"
    # what was named and not run still counts
    weak = compare({s: 0.02 + v for s, v in noise.items()}, dict.fromkeys(range(8), 0.0), True)
    assert 0.01 < weak.p < 0.05
    assert [word for word, _ in conclude([weak])] == ["higher"]
    unrun = [of(0, 1.0)] * (MAX_COMPARISONS - 1)
    assert conclude([weak, *unrun])[0][0] == "no difference found"
    assert conclude([]) == []
