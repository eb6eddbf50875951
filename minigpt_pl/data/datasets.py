"""Windows of tokens in batches, for training and for evaluation.

The law of training data: **a batch is a pure function of (seed, optimizer step, row)**. Rows are numbered across all
micro-batches and devices of a step, and random numbers are derived from these three, never stored. So 4 micro-batches
of 16 rows are 1 of 64, any number of devices sees the same global batch, a resume is exact at any step, and workers,
evaluation or sampling cannot disturb training. Starts of windows are drawn as fractions of the split, so runs that
differ in other options see equal batches.

Where tokens come from is in `token_cache`, which windows an evaluation reads in `datamodule`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from minigpt_pl.data.config import SamplingMode
from minigpt_pl.data.token_cache import TokenArray
from minigpt_pl.runtime.seeding import derive_seed, uniform

IGNORE_INDEX = -100  # the target of padding, torch's own convention


class Batch(NamedTuple):
    """A micro-batch to train on."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T), the tokens that follow the inputs


class EvalBatch(NamedTuple):
    """A batch to evaluate on."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T), IGNORE_INDEX where padded
    counts: Tensor  # (B, 4), targets that are not padding, their characters, their bytes, and the window's draws


def sample_starts(count: int, choices: int, *purpose: object) -> NDArray[np.int64]:
    """`count` random numbers below `choices`, drawn as fractions: another `choices` only scales them."""
    return (uniform(count, *purpose) * choices).astype(np.int64)


@lru_cache(maxsize=2)  # an evaluation may sample two splits
def distinct_starts(count: int, choices: int, *purpose: object) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct numbers among `sample_starts` (n,), in order, and how often each was drawn (n,)."""
    return np.unique(sample_starts(count, choices, *purpose), return_counts=True)


class Segments:
    """Where the segments of a split begin and end, in tokens. No window runs over two of them.

    Args:
        lengths: Tokens of each.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = np.array(lengths, np.int64)
        self.ends = self.lengths.cumsum()
        self.begins = self.ends - self.lengths

    def choices(self, block_size: int) -> int:
        """How many windows there are."""
        return int(np.maximum(0, self.lengths - block_size).sum())

    def window_starts(self, block_size: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the windows with these numbers, below `choices`, begin."""
        room = np.maximum(0, self.lengths - block_size)
        segment = np.searchsorted(room.cumsum(), numbers, side="right")
        return self.begins[segment] + numbers - (room.cumsum() - room)[segment]

    def covering_starts(self, block_size: int) -> NDArray[np.int64]:
        """Where the windows begin that together have each token but the first of a segment as a target."""
        counts = -(-(self.lengths - 1) // block_size)
        return np.concatenate([b + block_size * np.arange(n) for b, n in zip(self.begins, counts, strict=True)])

    def end_behind(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The end of the segment that each position lies in."""
        return self.ends[np.searchsorted(self.ends, positions, side="right")]


def windows_in_epoch(lengths: Sequence[int], block_size: int) -> NDArray[np.int64]:
    """Adjacent windows in each segment, one fewer than fit, so that the start of the first one can vary."""
    counts = np.maximum(1, (np.array(lengths, np.int64) - 1) // block_size - 1)
    return np.where(np.array(lengths) > block_size, counts, 0)


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def epoch_starts(lengths: tuple[int, ...], block_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Starts of the windows of an epoch, in shuffled order: no token is a target twice."""
    segments, counts = Segments(lengths), windows_in_epoch(lengths, block_size)
    room = np.clip(segments.lengths - counts * block_size, 1, block_size)
    shifts = (uniform(1, seed, "shift", epoch) * room).astype(np.int64)
    firsts = segments.begins + shifts
    starts = np.concatenate([first + block_size * np.arange(n) for first, n in zip(firsts, counts, strict=True)])
    order = np.random.Philox(key=derive_seed(seed, "order", epoch)).random_raw(len(starts)).argsort(kind="stable")
    return starts[order]


@dataclass(eq=False)
class TrainDataset(Dataset[Batch]):
    """Item i is micro-batch i of the run, this process's rows of it.

    Token noise replaces inputs, not targets, by uniformly drawn tokens (after Xie et al., arXiv 1703.02573).
    """

    ids: TokenArray  # (N,), of the training split
    block_size: int  # T
    batch_size: int  # B, windows in a micro-batch over all processes
    seed: int
    accumulate: int = 1  # micro-batches in an optimizer step
    rank: int = 0
    world: int = 1  # processes
    sampling: SamplingMode = "random"  # windows start anywhere, with replacement; "epoch": see `epoch_starts`
    token_noise: float = 0.0  # share of the inputs that is replaced
    vocab_size: int = 0
    lengths: tuple[int, ...] = ()  # tokens of each segment; by default there is one

    def __post_init__(self) -> None:
        self.lengths = self.lengths or (len(self.ids),)
        self.segments = Segments(self.lengths)
        assert self.segments.choices(self.block_size), "there is no window to train on"

    def _rows(self, i: int) -> tuple[int, int, int]:
        """The optimizer step of micro-batch i, and the first and last + 1 of its rows in that step."""
        step, micro = divmod(i, self.accumulate)
        return step, self.batch_size * micro, self.batch_size * (micro + 1)

    def _starts(self, i: int) -> NDArray[np.int64]:
        """Starts of the windows of micro-batch i, over all processes, (B,)."""
        if self.sampling == "epoch":
            size, count = self.block_size, int(windows_in_epoch(self.lengths, self.block_size).sum())
            rows = range(i * self.batch_size, (i + 1) * self.batch_size)
            return np.array([epoch_starts(self.lengths, size, self.seed, row // count)[row % count] for row in rows])
        step, begin, end = self._rows(i)
        drawn = sample_starts(end, self.segments.choices(self.block_size), self.seed, "batch", step)[begin:]
        return self.segments.window_starts(self.block_size, drawn)

    def _noise(self, i: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which inputs of micro-batch i are replaced, (B, T), and the tokens that replace them, (B, T)."""
        step, begin, end = self._rows(i)
        drawn = uniform(2 * self.block_size * end, self.seed, "noise", step).reshape(end, self.block_size, 2)[begin:]
        return drawn[:, :, 0] < self.token_noise, (drawn[:, :, 1] * self.vocab_size).astype(np.int64)

    def __getitem__(self, i: int) -> Batch:
        share = self.batch_size // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        positions = self._starts(i)[mine, None] + np.arange(self.block_size + 1)  # (B / world, T + 1)
        windows = self.ids[positions].astype(np.int64)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        if self.token_noise:
            replaced, tokens = self._noise(i)
            inputs = np.where(replaced[mine], tokens[mine], inputs)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


class FixedSampler(SequentialSampler, DistributedSampler[Any]):
    """A sampler that Lightning leaves as it is: in a fixed order already, and divided among the processes already."""


@dataclass(eq=False)
class StepSampler(FixedSampler):
    """Indices of the micro-batches of one epoch, from where the run stands when the first one is read."""

    length: int  # micro-batches of an epoch
    start: Callable[[], int]  # the next micro-batch of the run, counted from the first step

    def __iter__(self) -> Iterator[int]:
        start = self.start()  # not before the first batch: a checkpoint is restored after this iterator is made
        yield from range(start, start + self.length)

    def __len__(self) -> int:
        return self.length


@dataclass(eq=False)
class EvalDataset(Dataset[EvalBatch]):
    """The windows at `starts`, in batches of one shape; the last one is padded, later ones are all padding."""

    ids: TokenArray  # (N,), of one split
    token_lengths: NDArray[np.int64]  # (V, 2), characters and bytes of each token
    block_size: int  # T
    batch_size: int  # B
    starts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    lengths: tuple[int, ...] = ()  # tokens of each segment; by default there is one

    def __post_init__(self) -> None:
        self.segments = Segments(self.lengths or (len(self.ids),))

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __getitem__(self, i: Any) -> EvalBatch:
        return self.batch_at(self.starts[i * self.batch_size : (i + 1) * self.batch_size])

    def batch_at(self, starts: NDArray[np.int64], draws: NDArray[np.int64] | None = None) -> EvalBatch:
        """The batch of the windows at `starts` (n,), each drawn `draws` (n,) times, by default once.

        Positions after the end of the split, or of a segment, are padding.
        """
        positions = starts[:, None] + np.arange(self.block_size + 1)  # (n, T + 1)
        ends = self.segments.end_behind(starts)[:, None]
        scored = positions[:, 1:] < ends  # (n, T)
        windows = self.ids[np.minimum(positions, ends - 1)].astype(np.int64)
        targets = np.where(scored, windows[:, 1:], IGNORE_INDEX)
        lengths = (self.token_lengths[windows[:, 1:]] * scored[..., None]).sum(1)  # (n, 2)
        draws = np.ones_like(starts) if draws is None else draws
        counts = np.concatenate([scored.sum(1, keepdims=True), lengths, draws[:, None]], 1)
        rows = [(0, self.batch_size - len(starts)), (0, 0)]
        return EvalBatch(
            torch.from_numpy(np.pad(windows[:, :-1], rows)),
            torch.from_numpy(np.pad(targets, rows, constant_values=IGNORE_INDEX)),
            torch.from_numpy(np.pad(counts, rows)),
        )


@dataclass(eq=False)
class SampledEvalDataset(EvalDataset):
    """Batches of windows that are drawn anew, with replacement, for each evaluation: the reference report's estimator.

    A window that is drawn several times is read once, and its loss is weighted: on a short split that is far cheaper.
    Item (step, i) is batch i of the evaluation at a step. The last batches may be all padding, since Lightning needs
    the same number at each step.
    """

    drawn_batches: int = 0  # in an evaluation
    purpose: tuple[object, ...] = ()  # with the step it determines the windows; see `seeding.uniform`

    @property
    def _choices(self) -> int:
        return self.segments.choices(self.block_size)

    def __len__(self) -> int:
        return min(self.drawn_batches, -(-self._choices // self.batch_size))

    def __getitem__(self, item: Any) -> EvalBatch:
        step, i = item
        starts, draws = distinct_starts(self.drawn_batches * self.batch_size, self._choices, *self.purpose, step)
        batch = slice(self.batch_size * i, self.batch_size * (i + 1))
        return self.batch_at(self.segments.window_starts(self.block_size, starts[batch]), draws[batch])


@dataclass(eq=False)
class DistributedEvalSampler(FixedSampler):
    """This process's share of an evaluation's batches, as many as every other process has."""

    count: int  # batches over all processes
    rank: int
    world: int  # processes
    step: Callable[[], int] | None = None  # the evaluation's step, for the items of a SampledEvalDataset

    def __iter__(self) -> Iterator[Any]:
        mine = range(self.rank, len(self) * self.world, self.world)  # batches after `count` are all padding
        return iter(mine) if self.step is None else iter([(self.step(), i) for i in mine])

    def __len__(self) -> int:
        return -(-self.count // self.world)
