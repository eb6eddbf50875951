"""Windows of tokens in batches: those to train on are pure functions of their number, those of a check cover a part.

Where tokens come from is in `tokens`, which windows a check reads in `data`.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from minigpt_pl.data.token_cache import TokenArray
from minigpt_pl.runtime.seeding import derive_seed, uniform

IGNORE_INDEX = -100  # the target of padding, torch's own convention
SamplingMode = Literal["random", "epoch"]


class Batch(NamedTuple):
    """Windows of a part: inputs (B, T) and the tokens that follow them (B, T)."""

    inputs: Tensor
    targets: Tensor


class EvalBatch(NamedTuple):
    """A batch of a check; padding has the target IGNORED. counts (B, 3): scored tokens, their characters and bytes."""

    inputs: Tensor
    targets: Tensor
    counts: Tensor


def sample_starts(count: int, room: int, *purpose: object) -> NDArray[np.int64]:
    """`count` places, each one of the first `room`; drawn as fractions, so that another `room` scales them."""
    return (uniform(count, *purpose) * room).astype(np.int64)


def windows_in_epoch(length: int, block_size: int) -> int:
    """Windows side by side in `length` tokens, one fewer than could be, so that where the first one starts can vary."""
    return max(1, (length - 1) // block_size - 1)


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def epoch_starts(length: int, block_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where the windows of an epoch start, in shuffled sampling: no token is a target twice."""
    count = windows_in_epoch(length, block_size)
    (shift,) = sample_starts(1, min(block_size, length - count * block_size), seed, "shift", epoch)
    order = np.random.Philox(key=derive_seed(seed, "order", epoch)).random_raw(count).argsort(kind="stable")
    starts: NDArray[np.int64] = shift + order * block_size
    return starts


class TrainDataset(Dataset[Batch]):
    """Micro-batch number i of a run, this process's rows of it.

    Args:
        ids: Tokens of the train part.
        block_size: Targets in a window.
        batch_size: Windows in a micro-batch of all processes together.
        accumulate: Micro-batches in an optimizer step.
        seed: Decides, with the step and the row in it, where a window starts.
        rank: Number of this process.
        world: Number of processes.
        sampling: random: windows start anywhere, with replacement; or epoch, see `epoch_starts`.
        token_noise: Share of the inputs in whose place stands a token of the vocabulary, each as likely, so that the text is
            not learned by heart (after Xie et al., arXiv 1703.02573). Targets are as they are.
        vocab_size: Tokens of which noise is made.
    """

    def __init__(
        self,
        ids: TokenArray,
        block_size: int,
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int,
        world: int,
        sampling: SamplingMode = "random",
        token_noise: float = 0.0,
        vocab_size: int = 0,
    ):
        assert len(ids) > block_size, "there is no window to train on"
        self.ids, self.block_size, self.batch_size, self.accumulate = ids, block_size, batch_size, accumulate
        self.seed, self.rank, self.world, self.sampling = seed, rank, world, sampling
        self.token_noise, self.vocab_size = token_noise, vocab_size

    def starts(self, i: int) -> NDArray[np.int64]:
        """Where the windows of micro-batch i start, those of all processes."""
        if self.sampling == "epoch":
            length, size = len(self.ids), self.block_size
            count = windows_in_epoch(length, size)
            rows = range(i * self.batch_size, (i + 1) * self.batch_size)
            return np.array([epoch_starts(length, size, self.seed, row // count)[row % count] for row in rows])
        step, begin, end = self.step_rows(i)
        return sample_starts(end, len(self.ids) - self.block_size, self.seed, "batch", step)[begin:]

    def step_rows(self, i: int) -> tuple[int, int, int]:
        """The step of micro-batch i, and which rows of that step it has: however a step is cut, they are the same."""
        step, micro = divmod(i, self.accumulate)
        return step, self.batch_size * micro, self.batch_size * (micro + 1)

    def token_noise_of(self, i: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which inputs of micro-batch i another token replaces, and by which, both (B, T)."""
        step, begin, end = self.step_rows(i)
        drawn = uniform(2 * self.block_size * end, self.seed, "noise", step).reshape(end, self.block_size, 2)[begin:]
        return drawn[:, :, 0] < self.token_noise, (drawn[:, :, 1] * self.vocab_size).astype(np.int64)

    def __getitem__(self, i: int) -> Batch:
        starts = self.starts(i)
        share = len(starts) // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        windows = self.ids[starts[mine, None] + np.arange(self.block_size + 1)].astype(np.int64)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        if self.token_noise:
            replaced, others = self.token_noise_of(i)
            inputs = np.where(replaced[mine], others[mine], inputs)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


class ResumableSampler(Sampler[int]):
    """Indices from `start` to `stop`; its length is the whole run's, so that bars and the loop count from 0."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


class EvalDataset(Dataset[EvalBatch]):
    """Given windows of a part in batches of one shape, the last one padded; batches beyond it are all padding.

    Args:
        ids: Tokens of the part.
        sizes: Characters and bytes of each token (V, 2).
        starts: Where windows start.
        block_size: Targets in a window.
        batch_size: Windows in a batch.
    """

    def __init__(
        self, ids: TokenArray, sizes: NDArray[np.int64], starts: NDArray[np.int64], block_size: int, batch_size: int
    ):
        self.ids, self.sizes, self.starts = ids, sizes, starts
        self.block_size, self.batch_size = block_size, batch_size

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __getitem__(self, i: Any) -> EvalBatch:
        return self.score(self.starts[i * self.batch_size : (i + 1) * self.batch_size])

    def score(self, starts: NDArray[np.int64]) -> EvalBatch:
        """A batch of the windows that start there; what lies beyond the part's end is padding."""
        places = starts[:, None] + np.arange(self.block_size + 1)
        scored = places[:, 1:] < len(self.ids)
        windows = self.ids[np.minimum(places, len(self.ids) - 1)].astype(np.int64)
        targets = np.where(scored, windows[:, 1:], IGNORE_INDEX)
        sizes = (self.sizes[windows[:, 1:]] * scored[..., None]).sum(1)
        counts = np.concatenate([scored.sum(1, keepdims=True), sizes], 1)
        short = [(0, self.batch_size - len(starts)), (0, 0)]
        return EvalBatch(
            torch.from_numpy(np.pad(windows[:, :-1], short)),
            torch.from_numpy(np.pad(targets, short, constant_values=IGNORE_INDEX)),
            torch.from_numpy(np.pad(counts, short)),
        )


class SampledEvalDataset(EvalDataset):
    """The seed document's estimator: `count` batches of windows drawn anew, with replacement, at each check.

    Args:
        ids: Tokens of the part.
        sizes: Characters and bytes of each token (V, 2).
        block_size: Targets in a window.
        batch_size: Windows in a batch.
        count: Batches of a check.
        purpose: What the windows are drawn for; with the check's step it decides them.
    """

    def __init__(
        self,
        ids: TokenArray,
        sizes: NDArray[np.int64],
        block_size: int,
        batch_size: int,
        count: int,
        purpose: tuple[object, ...],
    ):
        assert len(ids) > block_size, "there is no window to sample"
        super().__init__(ids, sizes, np.empty(0, np.int64), block_size, batch_size)
        self.count, self.purpose = count, purpose

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: Any) -> EvalBatch:
        """Batch i of the check at a step, for place (step, i)."""
        step, i = place
        if i >= self.count:
            return self.score(self.starts)
        begin, end = self.batch_size * i, self.batch_size * (i + 1)
        return self.score(sample_starts(end, len(self.ids) - self.block_size, *self.purpose, step)[begin:])


class DistributedEvalSampler(Sampler[Any]):
    """This process's share of a check's batches, as many as any other's.

    Args:
        count: Batches of all processes together.
        rank: Number of this process.
        world: Number of processes.
        step: Asked at each check for its step, which SampledBatches wants before the batch; or None.
    """

    def __init__(self, count: int, rank: int, world: int, step: Callable[[], int] | None = None):
        self.count, self.rank, self.world, self.step = count, rank, world, step

    def __iter__(self) -> Iterator[Any]:
        mine = range(self.rank, len(self) * self.world, self.world)  # beyond count: all padding
        return iter(mine) if self.step is None else iter([(self.step(), i) for i in mine])

    def __len__(self) -> int:
        return -(-self.count // self.world)
