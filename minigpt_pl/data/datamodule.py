"""The LightningDataModule: finds, checks, splits and tokenizes one text, and makes the loaders of every command.

Its options are in `config`. Reading is in `corpus`, tokens in `tokenizer` and `token_cache`, batches in `datasets`.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from minigpt_pl.data import datasets
from minigpt_pl.data.config import DataConfig
from minigpt_pl.data.corpus import TextStats, read_stats, text_error
from minigpt_pl.data.datasets import Batch, EvalBatch, EvalDataset
from minigpt_pl.data.sources import TextPath, cut, find_files
from minigpt_pl.data.token_cache import (
    SPLITS,
    MemmapTokens,
    SplitTokens,
    tokenize,
    tokenize_first,
    train_bpe,
)
from minigpt_pl.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.errors import UserError, rank_zero_print
from minigpt_pl.runtime.paths import cache_dir
from minigpt_pl.runtime.user_classes import find_class, register

EvalLoaders = DataLoader[EvalBatch] | list[DataLoader[EvalBatch]]


class TokenizedText(NamedTuple):
    """A text that has been read; its tokens go by the name of their split."""

    files: tuple[Path, ...]
    stats: TextStats
    tokenizer: Tokenizer
    tokens: dict[str, SplitTokens]


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning may resume within an epoch: where it stands follows from the step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""


class TextDataModule(LightningDataModule):
    """Windows of one text file for training and evaluation.

    Args:
        config: The arguments of DataConfig, by name.
    """

    config_class = DataConfig

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        register(DATA_MODULES, cls)

    def __init__(self, **config: Any):
        super().__init__()
        self.config = DataConfig(**config)
        self.save_hyperparameters(asdict(self.config))
        self.path = self.config.path  # or, after a checkpoint is loaded, the path that it remembers
        self.prompts: list[list[int]] = []  # token ids, for `predict`
        self.checkpoint: dict[str, Any] = {}  # this module's state in a checkpoint
        self._text: TokenizedText | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.dump(),
            "tokenizer_sha256": self.tokenizer.sha256,
            "text_path": self.absolute_path(),
            "text_sha256": self.text_stats.sha256,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.checkpoint = state_dict

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **overrides: Any) -> NoReturn:
        """Always raises a UserError: Lightning's version may execute code from the file."""
        remedy = "load the model with minigpt_pl.load_checkpoint, and create a TextDataModule"
        raise UserError(f"{checkpoint_path}: a TextDataModule is not loaded from a checkpoint", remedy=remedy)

    # The text.

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer if there is a checkpoint, else that of the text."""
        if self.checkpoint and self._text is None:
            return load_tokenizer(self.checkpoint["tokenizer"], self.checkpoint["tokenizer_sha256"])
        return self.read().tokenizer

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer.vocabulary)

    @property
    def text_stats(self) -> TextStats:
        return self.read().stats

    def tokens(self, split: str) -> NDArray[Any]:
        """Token ids of "train", "val" or "test", (N,); those of a large text lie in a file."""
        ids = self.read().tokens[split].ids
        return ids.ids if isinstance(ids, MemmapTokens) else ids

    def find_files(self) -> tuple[Path, ...]:
        """The files of the text: at `path`, among the shipped files, or where the checkpoint's run read them."""
        return find_files(self.path, self.checkpoint.get("text_path", ""))

    def absolute_path(self) -> TextPath:
        """The absolute path of the text file, or of each of several, as they were read."""
        files = list(map(str, self.read().files))
        return files[0] if len(files) == 1 else files

    def read(self) -> TokenizedText:
        """Reads, splits and tokenizes the text, once.

        Raises:
            UserError: If the text cannot be used, is too short, or is not the checkpoint's.
        """
        if self._text is None:
            files, cache, config = self.find_files(), cache_dir(), self.config
            missing = next((path for path in files if not path.exists()), None)
            if self.checkpoint and missing:
                raise text_error(missing, "the checkpoint's text is not there", "give its path with --data.path FILE")
            stats = read_stats(files, cache)
            if self.checkpoint and stats.sha256 != self.checkpoint["text_sha256"]:
                problem = "it is not the text that the checkpoint was trained on"
                if not config.allow_data_change:
                    remedy = "name that one with --data.path FILE, or use --data.allow_data_change true"
                    raise text_error(files[0], problem, remedy)
                rank_zero_print(f"data.path {files[0]}: {problem}; data.allow_data_change accepts it")
            shares = config.train_frac, 1 - config.test_frac
            segments = cut(files, stats, shares, config.split)
            if self.checkpoint:
                tokenizer = self.tokenizer
            elif config.tokenizer == "char":
                tokenizer = CharTokenizer(stats.alphabet)
            else:
                learned = segments if config.bpe_train_on == "train" else cut(files, stats, (1.0, 1.0), "joint")
                limits = config.bpe_vocab_size, config.bpe_min_pair_freq
                tokenizer = train_bpe(learned, stats, *limits, config.bpe_across_lines, cache)
            if config.split_unit == "tokens":
                tokens = tokenize_first(files, stats, tokenizer, shares, cache)
            else:
                tokens = tokenize(segments, stats, tokenizer, cache)
            window = config.block_size + 1
            evaluated = 2 if config.eval_mode == "full" else window
            for split, least in zip(SPLITS, (window, evaluated, evaluated), strict=True):
                if (longest := max(tokens[split].lengths)) < least and (split != "test" or config.test_frac):
                    where = " in its longest file" if len(segments) > 1 else ""
                    problem = f"it is too short: its {split} split has {longest} tokens{where} and needs {least}"
                    smaller = "a smaller model.block_size" if least == window else f"a larger share for {split}"
                    raise text_error(files[0], problem, f"use a longer text or {smaller}")
            self._text = TokenizedText(tuple(path.resolve() for path in files), stats, tokenizer, tokens)
        return self._text

    # Batches.

    def _loader(self, dataset: Dataset[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
        # With its own generator: an iterator draws a seed, which must not come from the global generator.
        return ResumableLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=self.config.num_workers,
            generator=torch.Generator(), worker_init_fn=signals.ignore_signals,
        )  # fmt: skip

    @property
    def batch_size(self) -> int:
        """Windows in a micro-batch. It can be set, as Lightning's tuner does."""
        return self.config.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self.config = replace(self.config, batch_size=value)

    def steps_per_epoch(self, accumulate: int = 1) -> int:
        """Optimizer steps that read about as many tokens as the training split has."""
        windows = datasets.windows_in_epoch(self.read().tokens["train"].lengths, self.config.block_size)
        return max(1, int(windows.sum()) // (self.config.batch_size * accumulate))

    def train_dataloader(self) -> DataLoader[Batch]:
        """The micro-batches of an epoch; with max_steps alone the whole run is one epoch."""
        trainer: Any = self.trainer
        config = self.config
        if trainer is None:
            accumulate, world, rank = 1, 1, 0
        else:
            accumulate, world, rank = trainer.accumulate_grad_batches, trainer.world_size, trainer.global_rank
        steps = self.steps_per_epoch(accumulate)
        if trainer is not None and trainer.max_epochs == -1 and trainer.max_steps > 0:
            steps = trainer.max_steps

        def next_micro_batch() -> int:  # to overfit, each epoch reads the same batches
            return 0 if trainer is None or trainer.overfit_batches else trainer.global_step * accumulate

        if config.batch_size % world:
            problem = f"it must be a multiple of the number of devices, {world}"
            raise UserError(problem, option="data.batch_size", value=config.batch_size)
        dataset = datasets.TrainDataset(
            self.read().tokens["train"].ids, config.block_size, config.batch_size, config.seed, accumulate, rank, world,
            config.sampling, config.token_noise, self.vocab_size, self.read().tokens["train"].lengths,
        )  # fmt: skip
        return self._loader(dataset, datasets.StepSampler(steps * accumulate, next_micro_batch))

    def eval_step(self) -> int:
        """The step that an evaluation belongs to: the run's, or the checkpoint's."""
        return (self.trainer.global_step if self.trainer else 0) or self.checkpoint.get("step", 0)

    def _window_starts(self, split: str) -> NDArray[np.int64]:
        """Where the windows begin that cover a split; the first token of a segment is not a target."""
        return datasets.Segments(self.read().tokens[split].lengths).covering_starts(self.config.block_size)

    def eval_dataset(self, split: str, windows: int | None = None) -> EvalDataset:
        """At most `windows` windows of a split, evenly spaced; by default as many as max_eval_tokens allows."""
        starts = self._window_starts(split)
        limit = max(1, self.config.max_eval_tokens // self.config.block_size) if windows is None else windows
        if len(starts) > limit:
            starts = starts[np.arange(limit) * len(starts) // limit]
        return EvalDataset(**self._eval_args(split), starts=starts)

    def _eval_args(self, split: str) -> dict[str, Any]:
        text, config = self.read(), self.config
        sizes = {"block_size": config.block_size, "batch_size": config.batch_size}
        return {**text.tokens[split]._asdict(), "token_lengths": text.tokenizer.token_lengths, **sizes}

    def eval_dataloader(self, split: str, sampled: bool) -> DataLoader[EvalBatch]:
        """The batches of a sampled or of a full evaluation of a split, this process's share of them."""
        trainer, config = self.trainer, self.config
        dataset, step = self.eval_dataset(split), None
        if sampled:
            purpose = (config.seed, "check", split)  # a fixed key: another one would draw other windows
            dataset = datasets.SampledEvalDataset(
                **self._eval_args(split), drawn_batches=config.eval_iters, purpose=purpose
            )
            step = self.eval_step
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler = datasets.DistributedEvalSampler(len(dataset), rank, world, step)
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> EvalLoaders:
        """The validation split; in `fit` with eval_mode sampled the training split too, as in the reference report."""
        trainer = self.trainer
        if self.config.eval_mode == "sampled" and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            return [self.eval_dataloader("val", True), self.eval_dataloader("train", True)]
        return self._eval_dataloaders("val")

    def test_dataloader(self) -> EvalLoaders:
        return self._eval_dataloaders("test")

    def _eval_dataloaders(self, split: str) -> EvalLoaders:
        """One for each estimator of a split's loss that eval_mode names; the first one chooses best.ckpt."""
        if self.config.eval_mode == "both":
            return [self.eval_dataloader(split, True), self.eval_dataloader(split, False)]
        return self.eval_dataloader(split, self.config.eval_mode == "sampled")

    def predict_dataloader(self) -> DataLoader[list[int]]:
        """Token ids of each of `prompts`, by default of one empty prompt."""
        prompts = self.prompts or [self.tokenizer.encode_prompt("")]
        return DataLoader(prompts, batch_size=None, collate_fn=list)  # type: ignore[arg-type]

    def train_eval_batches(self) -> Iterator[EvalBatch]:
        """As many windows of the training split as an evaluation of the validation split reads."""
        full, drawn = self.config.eval_mode == "full", self.config.eval_iters * self.config.batch_size
        windows = len(self.eval_dataset("val").starts) if full else drawn
        batches = self.eval_dataset("train", windows)
        return (batches[i] for i in range(len(batches)))

    def subsampling_note(self, split: str) -> str | None:
        """One line for the user if a full evaluation leaves out windows, else None."""
        total, read = len(self._window_starts(split)), len(self.eval_dataset(split).starts)
        if self.config.eval_mode == "sampled" or read == total:
            return None
        limit = f"data.max_eval_tokens {self.config.max_eval_tokens}"
        return f"{limit}: an evaluation of {split} reads {read} of {total} windows, evenly spaced"


DATA_MODULES: dict[str, type[TextDataModule]] = {"TextDataModule": TextDataModule}
"""By class name, those of the user included."""


def datamodule_of(config: dict[str, Any]) -> TextDataModule:
    """The data of a run, from its configuration."""
    cls: type[TextDataModule] = find_class(DATA_MODULES, config.get("data_class", "TextDataModule"), config)
    return cls(**config["data"], block_size=config["model"]["init_args"]["block_size"])
