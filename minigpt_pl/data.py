"""From a text file to batches: split the characters, tokenize each part, keep the tokens, draw windows.

A training batch is a pure function of (seed, optimizer step, row); a check reads its part window by window. What a
file may contain is in `text`, what a token is in `tokenizer`; models are unknown here.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from minigpt_pl import signals
from minigpt_pl import tokenizer as tokenizers
from minigpt_pl.errors import InputError, say
from minigpt_pl.randomness import fractions
from minigpt_pl.text import TextInfo, pieces, scan, write_atomically
from minigpt_pl.tokenizer import BPETokenizer, CharTokenizer, Tokenizer

PARTS = ("train", "val", "test")
IGNORED = -100  # the target of padding, torch's own convention
MERGE_CHARACTERS = 50_000_000  # of the train part that BPE learns its merges from, at most


class Batch(NamedTuple):
    """Windows of a part: inputs (B, T) and the tokens that follow them (B, T)."""

    inputs: Tensor
    targets: Tensor


class Scored(NamedTuple):
    """A batch of a check; padding has the target IGNORED. counts (B, 3): scored tokens, their characters and bytes."""

    inputs: Tensor
    targets: Tensor
    counts: Tensor


class TrainBatches(Dataset[Batch]):
    """Micro-batch number i of a run, this process's rows of it; windows start anywhere, with replacement."""

    def __init__(self, ids: NDArray[Any], block_size: int, batch_size: int, accumulate: int, seed: int, rank: int, world: int):
        self.ids, self.block_size, self.batch_size, self.accumulate = ids, block_size, batch_size, accumulate
        self.seed, self.rank, self.world = seed, rank, world

    def __getitem__(self, i: int) -> Batch:
        step, micro = divmod(i, self.accumulate)
        rows = fractions(self.batch_size * (micro + 1), self.seed, "batch", step)[self.batch_size * micro :]
        mine = np.array_split(rows, self.world)[self.rank]
        windows = gather(self.ids, (mine * (len(self.ids) - self.block_size)).astype(np.int64), self.block_size + 1)
        return Batch(windows[:, :-1], windows[:, 1:])


class FromStep(Sampler[int]):
    """Indices from `start` to `stop`; its length is the whole run's, so that bars and the loop count from its beginning."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


class ScoredBatches(Dataset[Scored]):
    """Windows of a part in batches of one shape, the last one padded; this process's share of the batches.

    Args:
        ids: Tokens of the part.
        sizes: Characters and bytes of each token (V, 2).
        starts: Where windows start.
        block_size: Targets in a window.
        batch_size: Windows in a batch.
    """

    def __init__(self, ids: NDArray[Any], sizes: NDArray[np.int64], starts: NDArray[np.int64], block_size: int, batch_size: int):
        self.ids, self.sizes, self.starts = ids, sizes, starts
        self.block_size, self.batch_size = block_size, batch_size

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __getitem__(self, i: int) -> Scored:
        starts = self.starts[i * self.batch_size : (i + 1) * self.batch_size]
        return self.score(starts)

    def score(self, starts: NDArray[np.int64]) -> Scored:
        places = starts[:, None] + np.arange(self.block_size + 1)
        scored = places[:, 1:] < len(self.ids)
        windows = self.ids[np.minimum(places, len(self.ids) - 1)].astype(np.int64)
        targets = np.where(scored, windows[:, 1:], IGNORED)
        sizes = (self.sizes[windows[:, 1:]] * scored[..., None]).sum(1)
        counts = np.concatenate([scored.sum(1, keepdims=True), sizes], 1)
        short = [(0, self.batch_size - len(starts)), (0, 0)]
        return Scored(
            torch.from_numpy(np.pad(windows[:, :-1], short)),
            torch.from_numpy(np.pad(targets, short, constant_values=IGNORED)),
            torch.from_numpy(np.pad(counts, short)),
        )


class SampledBatches(ScoredBatches):
    """The seed document's estimator: `count` batches of windows drawn anew, with replacement, at each check."""

    def __init__(self, *args: Any, count: int, purpose: tuple[object, ...]):
        super().__init__(*args)
        self.count, self.purpose = count, purpose

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: Any) -> Scored:
        step, i = place
        if i >= self.count:
            return self.score(self.starts)
        draws = fractions(self.batch_size * (i + 1), *self.purpose, step)[self.batch_size * i :]
        return self.score((draws * (len(self.ids) - self.block_size)).astype(np.int64))


class CheckSampler(Sampler[Any]):
    """This process's share of a check's batches; with a datamodule, (check's step, batch) as SampledBatches needs it."""

    def __init__(self, count: int, rank: int, world: int, data: "TextDataModule | None" = None):
        self.count, self.rank, self.world, self.data = count, rank, world, data

    def __iter__(self) -> Iterator[Any]:
        mine = range(self.rank, len(self) * self.world, self.world)  # beyond count: all padding
        return iter(mine) if self.data is None else ((self.data.check_step(), i) for i in mine)

    def __len__(self) -> int:
        return -(-self.count // self.world)


def gather(ids: NDArray[Any], starts: NDArray[np.int64], length: int) -> Tensor:
    """Windows (rows, length) of consecutive tokens, as int64, in one indexing."""
    return torch.from_numpy(ids[starts[:, None] + np.arange(length)].astype(np.int64))


def cache_home() -> Path | None:
    """`$XDG_CACHE_HOME/minigpt`, else `~/.cache/minigpt`, made if need be; None where that cannot be written."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / f"probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        print(f"the token cache {home} cannot be written ({error.strerror}): tokens stay in memory", file=sys.stderr)
        return None
    return home


@dataclass
class Sources:
    """A text that has been read: what is known of it, its tokenizer, and the tokens of each part."""

    info: TextInfo
    tokenizer: Tokenizer
    tokens: dict[str, NDArray[Any]]


def split(path: Path, bounds: list[int]) -> Iterator[tuple[int, str]]:
    """Pieces of the text with the number of the part that each lies in; `bounds` are the parts' ends in characters."""
    place, part = 0, 0
    for piece in pieces(path):
        while piece:
            while place >= bounds[part] and part < len(bounds) - 1:
                part += 1
            cut = len(piece) if part == len(bounds) - 1 else bounds[part] - place
            yield part, piece[:cut]
            place, piece = place + len(piece[:cut]), piece[cut:]


class TextDataModule(LightningDataModule):
    """One text file as training windows and checks.

    Args:
        path: The text: UTF-8; sought in the working directory, then among the shipped files.
        block_size: Tokens in a window.
        batch_size: Windows in a micro-batch, over all devices.
        eval_every: Steps between checks.
        seed: Of the windows.
        train_frac: Share of the characters, from the start, to train on.
        test_frac: Share of the characters, from the end, that only `test` reads.
        tokenizer: A token is a character, or a piece of a line that byte-pair encoding has merged.
        bpe_vocab_size: Most tokens of the bpe tokenizer.
        bpe_min_pair_freq: A pair seen less often than this is not merged.
        eval_mode: full scores every token of a part once; sampled estimates from windows drawn at random.
        eval_iters: Batches that `sampled` draws.
        max_eval_tokens: A larger part is thinned to evenly spaced windows with this many tokens.
        num_workers: Processes that prepare batches beside the training process.
        allow_changed_text: Go on although the text is not the one that the checkpoint was trained on.
    """

    def __init__(
        self,
        path: str,
        block_size: int,
        batch_size: int,
        eval_every: int,
        seed: int = 0,
        train_frac: float = 0.9,
        test_frac: float = 0.0,
        tokenizer: Literal["char", "bpe"] = "char",
        bpe_vocab_size: int = 512,
        bpe_min_pair_freq: int = 2,
        eval_mode: Literal["full", "sampled"] = "full",
        eval_iters: int = 100,
        max_eval_tokens: int = 2_000_000,
        num_workers: int = 0,
        allow_changed_text: bool = False,
    ):
        super().__init__()
        at_least_one = dict(
            batch_size=batch_size, eval_every=eval_every, eval_iters=eval_iters, max_eval_tokens=max_eval_tokens,
            bpe_vocab_size=bpe_vocab_size, bpe_min_pair_freq=bpe_min_pair_freq,
        )  # fmt: skip
        for name, value in at_least_one.items():
            if value < 1:
                raise InputError(f"data.{name} is {value}: it must be at least 1")
        if num_workers < 0:
            raise InputError(f"data.num_workers is {num_workers}: it must be 0, for none, or more")
        if not 0 < train_frac < 1:
            raise InputError(f"data.train_frac is {train_frac}: it must lie between 0 and 1")
        if not 0 <= test_frac < 1:
            raise InputError(f"data.test_frac is {test_frac}: it must be at least 0 and below 1")
        if train_frac + test_frac >= 1:
            raise InputError(
                f"data.train_frac {train_frac} and data.test_frac {test_frac} leave nothing to validate on: "
                "their sum must be below 1"
            )
        self.path, self.block_size, self.batch_size, self.eval_every, self.seed = path, block_size, batch_size, eval_every, seed
        self.train_frac, self.test_frac = train_frac, test_frac
        self.tokenizer_kind, self.bpe_vocab_size, self.bpe_min_pair_freq = tokenizer, bpe_vocab_size, bpe_min_pair_freq
        self.eval_mode, self.eval_iters, self.max_eval_tokens = eval_mode, eval_iters, max_eval_tokens
        self.num_workers, self.allow_changed_text = num_workers, allow_changed_text
        self.prompts: list[str] = []
        """What `predict` continues."""
        self.saved: dict[str, Any] = {}
        """What a checkpoint said of its text and tokenizer."""
        self._sources: Sources | None = None

    # What a checkpoint keeps.

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.dump(),
            "tokenizer_sha256": self.tokenizer.sha256,
            "text_path": str(self.found_path().resolve()),
            "text_sha256": self.text_info.sha256,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict

    # The text.

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer if there is one, else the text's own."""
        if self.saved and self._sources is None:
            return tokenizers.load(self.saved["tokenizer"])
        return self.read().tokenizer

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer.vocabulary)

    @property
    def text_info(self) -> TextInfo:
        return self.read().info

    def tokens(self, part: str) -> NDArray[Any]:
        """Token ids of "train", "val" or "test"."""
        return self.read().tokens[part]

    def found_path(self) -> Path:
        """Where the text is: as said, among the shipped files, or where the checkpoint's run read it."""
        path = Path(self.path).expanduser()
        if path.exists() or path.is_absolute():
            return path
        home = Path(__file__).parent
        for shipped in (home / "shipped" / path, home.parent / path):
            if shipped.is_file():
                return shipped
        remembered = Path(self.saved.get("text_path", path))
        return remembered if remembered.is_file() else path

    def read(self) -> Sources:
        """Reads, splits and tokenizes the text, once.

        Raises:
            InputError: If the text cannot be used, is too short, or is not the checkpoint's.
        """
        if self._sources is None:
            path, cache = self.found_path(), cache_home()
            if self.saved and not path.exists():
                raise InputError(f"the checkpoint's text {path} is gone: name it with --data.path FILE")
            info = scan(path, cache)
            if self.saved and info.sha256 != self.saved["text_sha256"]:
                if not self.allow_changed_text:
                    raise InputError(
                        f"data.path {path} is not the text that the checkpoint was trained on: name that one with "
                        "--data.path FILE, or give --data.allow_changed_text true"
                    )
                say(f"data.path {path} is not the text that the checkpoint was trained on: going on with it")
            ends = [int(f * info.characters) for f in (self.train_frac, 1 - self.test_frac)] + [info.characters]
            if self.saved:
                tokenizer = tokenizers.load(self.saved["tokenizer"])
            elif self.tokenizer_kind == "char":
                tokenizer = CharTokenizer(info.alphabet)
            else:
                tokenizer = self._learn_merges(path, info, ends)
            tokens = self._tokenize(path, info, tokenizer, ends, cache)
            self._refuse_short(path, info, ends, tokens)
            self._sources = Sources(info, tokenizer, tokens)
        return self._sources

    def _learn_merges(self, path: Path, info: TextInfo, ends: list[int]) -> Tokenizer:
        def merged_from() -> Iterator[str]:
            room = MERGE_CHARACTERS
            for part, piece in split(path, ends):
                if part > 0 or room <= 0:
                    return
                yield piece[:room]
                room -= len(piece)

        return BPETokenizer.train(info.alphabet, merged_from(), self.bpe_vocab_size, self.bpe_min_pair_freq)

    def _tokenize(
        self, path: Path, info: TextInfo, tokenizer: Tokenizer, ends: list[int], cache: Path | None
    ) -> dict[str, NDArray[Any]]:
        dtype = np.uint16 if len(tokenizer.vocabulary) <= 1 << 16 else np.uint32

        def encoded() -> Iterator[tuple[int, NDArray[Any]]]:
            held, of = "", 0  # a line is encoded whole, also where two pieces of the file share it
            for part, piece in split(path, ends):
                if part != of:
                    yield of, tokenizer.encode(held).astype(dtype)
                    held, of = "", part
                whole, newline, rest = piece.rpartition("\n")
                if newline or tokenizer.kind == CharTokenizer.kind:
                    yield of, tokenizer.encode(held + whole + newline).astype(dtype)
                    held = ""
                held += rest
            yield of, tokenizer.encode(held).astype(dtype)

        if cache is None:
            in_memory: list[list[NDArray[Any]]] = [[np.empty(0, dtype)] for _ in PARTS]
            for part, ids in encoded():
                in_memory[part].append(ids)
            return {name: np.concatenate(chunks) for name, chunks in zip(PARTS, in_memory, strict=True)}

        name = f"tokens-{info.sha256[:24]}-{tokenizer.sha256[:24]}-{'-'.join(map(str, ends))}"
        binary, index = cache / f"{name}.bin", cache / f"{name}.json"
        with FileLock(cache / f"{name}.lock"):
            if not (index.exists() and binary.exists()):
                lengths = [0] * len(PARTS)
                temporary = cache / f"{name}.{os.getpid()}.tmp"
                with temporary.open("wb") as file:
                    for part, ids in encoded():
                        lengths[part] += len(ids)
                        file.write(ids.tobytes())
                os.replace(temporary, binary)
                write_atomically(index, json.dumps(lengths).encode())
        lengths = json.loads(index.read_text("utf-8"))
        everything = np.memmap(binary, dtype, "r", shape=(sum(lengths),))
        return dict(zip(PARTS, np.split(everything, np.cumsum(lengths)[:-1]), strict=True))

    def _refuse_short(self, path: Path, info: TextInfo, ends: list[int], tokens: dict[str, NDArray[Any]]) -> None:
        shares = dict(zip(PARTS, (self.train_frac, 1 - self.train_frac - self.test_frac, self.test_frac), strict=True))
        least = {"train": self.block_size + 1, "val": 2} | ({"test": 2} if self.test_frac else {})
        sizes = dict(zip(PARTS, np.diff([0, *ends]).tolist(), strict=True))
        short = {part: need for part, need in least.items() if len(tokens[part]) < need}
        if short:
            # Characters that each token stands for, so that the answer holds for merged tokens too.
            need = max(
                int(np.ceil(need * max(1.0, sizes[part] / max(1, len(tokens[part]))) / shares[part] + 1))
                for part, need in short.items()
            )
            part = next(iter(short))
            raise InputError(
                f"data.path {path} is too short: its {part} part has {len(tokens[part])} tokens and needs {short[part]}, "
                f"so the text needs about {max(need, info.characters + 1)} characters, and has {info.characters}; "
                "a smaller model.block_size needs less"
            )

    # Batches.

    def check_step(self) -> int:
        """The step that a check belongs to: the run's, or the checkpoint's."""
        assert self.trainer is not None
        return self.trainer.global_step or self.saved.get("step", 0)

    def _loader(self, dataset: Dataset[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
        # A generator of its own: making an iterator draws a seed, which must not come from the global one.
        return DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=self.num_workers, generator=torch.Generator(),
            worker_init_fn=signals.ignore,
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
        if self.batch_size % world:
            raise InputError(f"data.batch_size is {self.batch_size}: it must be a multiple of the {world} devices")
        batches = TrainBatches(
            self.tokens("train"), self.block_size, self.batch_size, accumulate, self.seed, trainer.global_rank, world
        )
        return self._loader(batches, FromStep(trainer.global_step * accumulate, trainer.max_steps * accumulate))

    def scored_batches(self, part: str, windows: int | None = None) -> ScoredBatches:
        """The windows of a part that a full check reads: all that max_eval_tokens allows, or so many, evenly spaced."""
        ids = self.tokens(part)
        starts = np.arange(0, len(ids) - 1, self.block_size)
        limit = max(1, self.max_eval_tokens // self.block_size) if windows is None else windows
        if len(starts) > limit:
            starts = starts[np.arange(limit) * len(starts) // limit]
        return ScoredBatches(ids, self.tokenizer.sizes, starts, self.block_size, self.batch_size)

    def check_loader(self, part: str) -> DataLoader[Scored]:
        """What a check of a part reads, this process's share of it."""
        trainer = self.trainer
        assert trainer is not None
        if self.eval_mode == "full":
            batches = self.scored_batches(part)
            return self._loader(batches, CheckSampler(len(batches), trainer.global_rank, trainer.world_size))
        ids = self.tokens(part)
        if len(ids) <= self.block_size:
            raise InputError(
                f"data.eval_mode is sampled, but the {part} part has {len(ids)} tokens and no window of "
                f"{self.block_size + 1}: use full"
            )
        sampled = SampledBatches(
            ids, self.tokenizer.sizes, np.empty(0, np.int64), self.block_size, self.batch_size,
            count=self.eval_iters, purpose=(self.seed, "check", part),
        )  # fmt: skip
        return self._loader(sampled, CheckSampler(len(sampled), trainer.global_rank, trainer.world_size, self))

    def val_dataloader(self) -> DataLoader[Scored] | list[DataLoader[Scored]]:
        """The validation part; under `sampled` the train part too, as the seed document's method has it."""
        if self.eval_mode == "sampled" and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            return [self.check_loader("val"), self.check_loader("train")]
        return self.check_loader("val")

    def test_dataloader(self) -> DataLoader[Scored]:
        return self.check_loader("test")

    def predict_dataloader(self) -> DataLoader[list[int]]:
        """Token ids of each prompt; an empty one is a newline, or the first token where the vocabulary has none."""
        tokenizer = self.tokenizer
        start = "\n" if "\n" in tokenizer.vocabulary else tokenizer.vocabulary[0]
        encoded = [tokenizer.encode(prompt or start).tolist() for prompt in self.prompts]
        return DataLoader(encoded, batch_size=None, collate_fn=list)  # type: ignore[arg-type]

    def final_batches(self) -> Iterator[Scored]:
        """As many windows of the train part as a check of the validation part reads."""
        sampled = self.eval_mode == "sampled"
        windows = self.eval_iters * self.batch_size if sampled else len(self.scored_batches("val").starts)
        batches = self.scored_batches("train", windows)
        return (batches[i] for i in range(len(batches)))

    def thinned(self, part: str) -> str | None:
        """What to say where a full check leaves out windows, or None."""
        windows = -(-(len(self.tokens(part)) - 1) // self.block_size)
        kept = len(self.scored_batches(part).starts)
        if self.eval_mode == "sampled" or kept == windows:
            return None
        return f"data.max_eval_tokens {self.max_eval_tokens}: a check of {part} reads {kept} of {windows} windows, evenly spaced"

