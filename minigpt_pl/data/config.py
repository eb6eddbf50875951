"""The options of the text, its tokenizer and its batches: names, ranges and defaults, each in one place.

The command line reads its `--data` options from here.
"""

from dataclasses import dataclass
from typing import Literal

from minigpt_pl.data.sources import SplitMode, TextPath
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.ranges import Fraction, NonNegativeInt, OpenUnitInterval, PositiveInt, Seed, check_ranges

SamplingMode = Literal["random", "epoch"]
EvalMode = Literal["full", "sampled", "both"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Options of a TextDataModule.

    Args:
        path: The text, in UTF-8: a file, a directory, a glob, or a list of such.
        block_size: Tokens in a window.
        batch_size: Windows in a micro-batch, over all devices.
        eval_every: Optimizer steps between evaluations.
        seed: Seed of the windows.
        train_frac: Share of the text, from the start, to train on.
        test_frac: Share of the text, from the end, that only `test` reads.
        split: How several files are split: joint cuts them as one text, joined by newlines; per_file cuts each file by
            itself, and no window runs over two files.
        split_unit: What these shares count: characters; or tokens, and then tokenizers validate on different text.
        tokenizer: char for characters, bpe for byte-pair encoding.
        bpe_vocab_size: Largest vocabulary of the bpe tokenizer.
        bpe_min_pair_freq: The bpe tokenizer merges no pair that occurs less often.
        bpe_across_lines: The bpe tokenizer merges across the ends of lines too; the text must be short.
        bpe_train_on: Text that the bpe tokenizer learns from: train is the first train_frac of the characters; all
            leaks validation and test text into the tokenizer.
        eval_mode: full scores every token of a split once; sampled estimates the loss from random windows; both does
            both, and the estimate chooses best.ckpt and stops the run.
        eval_iters: Batches in an evaluation with eval_mode sampled or both.
        max_eval_tokens: Most tokens in an evaluation with eval_mode full or both; of a larger split it reads a part.
        sampling: random draws training windows from anywhere, with replacement; epoch shuffles adjacent windows.
        token_noise: Share of the training inputs that are replaced by random tokens.
        num_workers: Processes that prepare batches, beside the training process.
        allow_data_change: Resume on a text that is not the checkpoint's.

    Raises:
        UserError: If a value is out of its range.
    """

    path: TextPath
    block_size: PositiveInt
    batch_size: PositiveInt
    eval_every: PositiveInt
    seed: Seed = 0
    train_frac: OpenUnitInterval = 0.9
    test_frac: Fraction = 0.0
    split: SplitMode = "joint"
    split_unit: Literal["characters", "tokens"] = "characters"
    tokenizer: Literal["char", "bpe"] = "char"
    bpe_vocab_size: PositiveInt = 512
    bpe_min_pair_freq: PositiveInt = 2
    bpe_across_lines: bool = False
    bpe_train_on: Literal["train", "all"] = "train"
    eval_mode: EvalMode = "full"
    eval_iters: PositiveInt = 100
    max_eval_tokens: PositiveInt = 2_000_000
    sampling: SamplingMode = "random"
    token_noise: Fraction = 0.0
    num_workers: NonNegativeInt = 0
    allow_data_change: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "data")
        if self.train_frac + self.test_frac >= 1:
            problem = f"with data.test_frac {self.test_frac}, nothing is left to validate on"
            remedy = "use a smaller share for either"
            raise UserError(problem, option="data.train_frac", value=self.train_frac, remedy=remedy)
        if self.split == "per_file" and (self.split_unit == "tokens" or self.bpe_across_lines):
            other = "split_unit tokens" if self.split_unit == "tokens" else "bpe_across_lines true"
            remedy = f"leave out data.{other}"
            raise UserError(f"it does not work with data.{other}", option="data.split", value="per_file", remedy=remedy)
