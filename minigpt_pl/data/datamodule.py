"""The text of a run: where it is, whether it will do, how it is tokenized, and which windows training and checks read.

How a text is read is in `text`, what a token is in `tokenizer`, how tokens are kept in `tokens`, how windows become
batches in `windows`; models are unknown here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from minigpt_pl.data import tokenizer as tokenizers
from minigpt_pl.data.corpus import TextStats, read_stats
from minigpt_pl.data.datasets import (
    Batch,
    DistributedEvalSampler,
    EvalBatch,
    EvalDataset,
    ResumableSampler,
    SampledEvalDataset,
    SamplingMode,
    TrainDataset,
)
from minigpt_pl.data.token_cache import SPLITS, MemmapTokens, TokenArray, cache_dir, tokenize, train_bpe
from minigpt_pl.data.tokenizer import CharTokenizer, Tokenizer
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.errors import UserError, rank_zero_print


@dataclass
class TokenizedText:
    """A text that has been read: what is known of it, its tokenizer, and the tokens of each part."""

    info: TextStats
    tokenizer: Tokenizer
    tokens: dict[str, TokenArray]


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
        sampling: random takes training windows from anywhere, with replacement; epoch takes them side by side, in shuffled order.
        token_noise: Share of training inputs replaced by tokens drawn at random, against learning a text by heart.
        num_workers: Processes that prepare batches beside the training process.
        allow_data_change: Go on although the text is not the one that the checkpoint was trained on.
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
        sampling: SamplingMode = "random",
        token_noise: float = 0.0,
        num_workers: int = 0,
        allow_data_change: bool = False,
    ):
        super().__init__()
        at_least_one = dict(
            batch_size=batch_size, eval_every=eval_every, eval_iters=eval_iters, max_eval_tokens=max_eval_tokens,
            bpe_vocab_size=bpe_vocab_size, bpe_min_pair_freq=bpe_min_pair_freq,
        )  # fmt: skip
        for name, value in at_least_one.items():
            if value < 1:
                raise UserError(f"data.{name} is {value}: it must be at least 1")
        if num_workers < 0:
            raise UserError(f"data.num_workers is {num_workers}: it must be 0, for none, or more")
        if not 0 <= token_noise < 1:
            raise UserError(f"data.token_noise is {token_noise}: it must be at least 0 and below 1")
        if not 0 < train_frac < 1:
            raise UserError(f"data.train_frac is {train_frac}: it must lie between 0 and 1")
        if not 0 <= test_frac < 1:
            raise UserError(f"data.test_frac is {test_frac}: it must be at least 0 and below 1")
        if train_frac + test_frac >= 1:
            raise UserError(
                f"data.train_frac {train_frac} and data.test_frac {test_frac} leave nothing to validate on: "
                "their sum must be below 1"
            )
        self.path, self.block_size, self.batch_size, self.eval_every, self.seed = (
            path,
            block_size,
            batch_size,
            eval_every,
            seed,
        )
        self.train_frac, self.test_frac = train_frac, test_frac
        self.tokenizer_kind, self.bpe_vocab_size, self.bpe_min_pair_freq = tokenizer, bpe_vocab_size, bpe_min_pair_freq
        self.eval_mode, self.eval_iters, self.max_eval_tokens = eval_mode, eval_iters, max_eval_tokens
        self.sampling, self.token_noise = sampling, token_noise
        self.num_workers, self.allow_data_change = num_workers, allow_data_change
        self.prompts: list[str] = []
        """What `predict` continues."""
        self.saved: dict[str, Any] = {}
        """What a checkpoint said of its text and tokenizer."""
        self._sources: TokenizedText | None = None

    # What a checkpoint keeps.

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.dump(),
            "tokenizer_sha256": self.tokenizer.sha256,
            "text_path": str(self.resolve_path().resolve()),
            "text_sha256": self.text_info.sha256,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **settings: Any) -> Any:
        """There is none: Lightning's own may execute what a file holds.

        Raises:
            InputError: Always.
        """
        raise UserError(f"{checkpoint_path}: load it with minigpt_pl.load_checkpoint, and name the text anew")

    # The text.

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer if there is one, else the text's own."""
        if self.saved and self._sources is None:
            return tokenizers.load_tokenizer(self.saved["tokenizer"], self.saved["tokenizer_sha256"])
        return self.read().tokenizer

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer.vocabulary)

    @property
    def text_info(self) -> TextStats:
        return self.read().info

    def tokens(self, part: str) -> NDArray[Any]:
        """Token ids of "train", "val" or "test"; those of a large text lie in a file."""
        ids = self.read().tokens[part]
        return ids.ids if isinstance(ids, MemmapTokens) else ids

    def resolve_path(self) -> Path:
        """Where the text is: as said, among the shipped files, or where the checkpoint's run read it."""
        path = Path(self.path).expanduser()
        if path.exists() or path.is_absolute():
            return path
        home = Path(__file__).parents[1]
        for shipped in (home / "shipped" / path, home.parent / path):
            if shipped.is_file():
                return shipped
        remembered = Path(self.saved.get("text_path", path))
        return remembered if remembered.is_file() else path

    def read(self) -> TokenizedText:
        """Reads, splits and tokenizes the text, once.

        Raises:
            InputError: If the text cannot be used, is too short, or is not the checkpoint's.
        """
        if self._sources is None:
            path, cache = self.resolve_path(), cache_dir()
            if self.saved and not path.exists():
                raise UserError(f"the checkpoint's text {path} is gone: name it with --data.path FILE")
            info = read_stats(path, cache)
            if self.saved and info.sha256 != self.saved["text_sha256"]:
                if not self.allow_data_change:
                    raise UserError(
                        f"data.path {path} is not the text that the checkpoint was trained on: name that one with "
                        "--data.path FILE, or give --data.allow_data_change true"
                    )
                rank_zero_print(
                    f"data.path {path} is not the text that the checkpoint was trained on: going on with it"
                )
            ends = [int(f * info.characters) for f in (self.train_frac, 1 - self.test_frac)] + [info.characters]
            if self.saved:
                tokenizer = self.tokenizer
            elif self.tokenizer_kind == "char":
                tokenizer = CharTokenizer(info.alphabet)
            else:
                tokenizer = train_bpe(path, info, ends[0], self.bpe_vocab_size, self.bpe_min_pair_freq, cache)
            tokens = tokenize(path, info, tokenizer, ends, cache)
            self._check_length(path, ends, tokens)
            self._sources = TokenizedText(info, tokenizer, tokens)
        return self._sources

    def _check_length(self, path: Path, ends: list[int], tokens: dict[str, TokenArray]) -> None:
        window = self.block_size + 1
        check = window if self.eval_mode == "sampled" else 2
        least = {"train": window, "val": check} | ({"test": check} if self.test_frac else {})
        for part, need in least.items():
            if (found := len(tokens[part])) >= need:
                continue
            share = {"train": self.train_frac, "val": 1 - self.train_frac - self.test_frac, "test": self.test_frac}[
                part
            ]
            characters = np.diff([0, *ends]).tolist()[SPLITS.index(part)]
            per_token = max(1.0, characters / max(1, found))  # as far as so short a part can tell
            enough = max(int(need * per_token / share) + 2, ends[-1] + 1)
            remedy = {window: "a smaller model.block_size needs less", 2: f"a larger share for {part} needs less"}[need]
            raise UserError(
                f"data.path {path} is too short: its {part} part has {found} tokens and needs {need}, so "
                f"the text needs about {enough} characters, and has {ends[-1]}; {remedy}"
            )

    # Batches.

    def eval_step(self) -> int:
        """The step that a check belongs to: the run's, or the checkpoint's."""
        assert self.trainer is not None
        return self.trainer.global_step or self.saved.get("step", 0)

    def _loader(self, dataset: Dataset[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
        # A generator of its own: making an iterator draws a seed, which must not come from the global one.
        return DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=self.num_workers, generator=torch.Generator(),
            worker_init_fn=signals.ignore_in_worker,
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
        if self.batch_size % world:
            raise UserError(f"data.batch_size is {self.batch_size}: it must be a multiple of the {world} devices")
        batches = TrainDataset(
            self.read().tokens["train"],
            self.block_size,
            self.batch_size,
            accumulate,
            self.seed,
            trainer.global_rank,
            world,
            self.sampling,
            self.token_noise,
            self.vocab_size,
        )
        return self._loader(batches, ResumableSampler(trainer.global_step * accumulate, trainer.max_steps * accumulate))

    def _windows(self, part: str) -> int:
        """How many windows cover a part; its first token is no target."""
        return -(-(len(self.read().tokens[part]) - 1) // self.block_size)

    def eval_dataset(self, part: str, windows: int | None = None) -> EvalDataset:
        """The windows of a part that a full check reads: all that max_eval_tokens allows, or so many, evenly spaced."""
        limit = max(1, self.max_eval_tokens // self.block_size) if windows is None else windows
        count = self._windows(part)
        chosen = np.arange(count) if count <= limit else np.arange(limit) * count // limit
        ids, sizes = self.read().tokens[part], self.tokenizer.token_lengths
        return EvalDataset(ids, sizes, chosen * self.block_size, self.block_size, self.batch_size)

    def eval_dataloader(self, part: str) -> DataLoader[EvalBatch]:
        """What a check of a part reads, this process's share of it."""
        trainer = self.trainer
        assert trainer is not None
        rank, world = trainer.global_rank, trainer.world_size
        if self.eval_mode == "full":
            batches = self.eval_dataset(part)
            return self._loader(batches, DistributedEvalSampler(len(batches), rank, world))
        sampled = SampledEvalDataset(
            self.read().tokens[part], self.tokenizer.token_lengths, self.block_size, self.batch_size,
            count=self.eval_iters, purpose=(self.seed, "check", part),
        )  # fmt: skip
        return self._loader(sampled, DistributedEvalSampler(len(sampled), rank, world, self.eval_step))

    def val_dataloader(self) -> DataLoader[EvalBatch] | list[DataLoader[EvalBatch]]:
        """The validation part; under `sampled` the train part too, as the seed document's method has it."""
        if self.eval_mode == "sampled" and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            return [self.eval_dataloader("val"), self.eval_dataloader("train")]
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[EvalBatch]:
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[list[int]]:
        """Token ids of each prompt."""
        encoded = [self.tokenizer.encode_prompt(prompt) for prompt in self.prompts]
        return DataLoader(encoded, batch_size=None, collate_fn=list)  # type: ignore[arg-type]

    def train_eval_batches(self) -> Iterator[EvalBatch]:
        """As many windows of the train part as a check of the validation part reads."""
        sampled = self.eval_mode == "sampled"
        windows = self.eval_iters * self.batch_size if sampled else len(self.eval_dataset("val").starts)
        batches = self.eval_dataset("train", windows)
        return (batches[i] for i in range(len(batches)))

    def subsampling_note(self, part: str) -> str | None:
        """What to say where a full check leaves out windows, or None."""
        windows, kept = self._windows(part), len(self.eval_dataset(part).starts)
        if self.eval_mode == "sampled" or kept == windows:
            return None
        limit = f"data.max_eval_tokens {self.max_eval_tokens}"
        return f"{limit}: a check of {part} reads {kept} of {windows} windows, evenly spaced"
