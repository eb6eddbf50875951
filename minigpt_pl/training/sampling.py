"""Text that a model writes: into samples.txt during a fit, to stdout in `predict`.

How tokens are chosen is in `generation`.
"""

import sys
from pathlib import Path
from typing import Any, final

from lightning.pytorch import Callback, LightningModule

from minigpt_pl.data.tokenizer import Tokenizer
from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.runtime.atomic_io import SAMPLES_FILE, atomic_write
from minigpt_pl.runtime.errors import rank_zero_print
from minigpt_pl.runtime.ranges import NonNegativeFinite, PositiveInt, TokenCount
from minigpt_pl.training.averaging import averaged_weights
from minigpt_pl.training.by_products import format_sample, read_whole_samples


@final
class SampleCallback(Callback):
    """Appends a sample of the model to samples.txt after evaluations; the run ends with one of its best model.

    `--samples null` writes and prints none.

    Args:
        every_n_evals: Evaluations between samples.
        prompt: What the samples continue.
        max_new_tokens: Tokens of a sample.
        temperature: Divides the logits, as in predict.
    """

    def __init__(
        self,
        every_n_evals: PositiveInt,
        prompt: str = "\n",
        max_new_tokens: TokenCount = 200,
        temperature: NonNegativeFinite = 0.8,
    ):
        self.every_n_evals, self.prompt = every_n_evals, prompt
        self.sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature)

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if unknown := unknown_characters(self.prompt, trainer.datamodule.tokenizer):
            rank_zero_print(f"samples.prompt: the text has no {unknown}; the samples begin without")
        path = Path(trainer.default_root_dir, SAMPLES_FILE)
        if trainer.is_global_zero and path.exists():  # samples from after the checkpoint are written again
            step = trainer.global_step
            extra = step % trainer.datamodule.config.eval_every != 0  # a longer run makes no evaluation here
            samples = [sample for sample in read_whole_samples(path) if sample[0] <= step - extra]
            atomic_write(path, "".join(format_sample(*sample) for sample in samples).encode())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        step = trainer.global_step
        due = step // trainer.datamodule.config.eval_every % self.every_n_evals == 0 or step >= trainer.max_steps
        if trainer.is_global_zero and due:
            with averaged_weights(trainer, pl_module):
                text = generate_sample(trainer, pl_module, self.prompt, self.sampling)
            with Path(trainer.default_root_dir, SAMPLES_FILE).open("a", encoding="utf-8", newline="") as file:
                file.write(format_sample(step, text))


def unknown_characters(prompt: str, tokenizer: Tokenizer) -> str:
    """The characters of a prompt that a tokenizer lacks, quoted; "" if there are none."""
    return " ".join(map(repr, sorted(set(prompt) - set("".join(tokenizer.vocabulary)))))


def generate_sample(trainer: Any, pl_module: Any, prompt: str, sampling: SamplingConfig) -> str:
    """A prompt and its continuation by the current model; characters that its vocabulary lacks are left out."""
    tokenizer = trainer.datamodule.tokenizer
    known_prompt = "".join(c for c in prompt if c in set("".join(tokenizer.vocabulary)))
    ids = tokenizer.encode(known_prompt or tokenizer.vocabulary[0]).tolist()
    was_training = pl_module.net.training
    pl_module.net.eval()
    tokens = [token for (token,) in generate(pl_module.net, ids, sampling)]
    pl_module.net.train(was_training)
    return known_prompt + tokenizer.decode(tokens)


class PredictionWriter(Callback):
    """predict: writes prompts and their continuations to stdout, as they are generated, and nothing else."""

    separator = ""

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        decode = trainer.datamodule.tokenizer.decode

        def write(tokens: list[int]) -> None:
            sys.stdout.write(decode(tokens[:1]))  # the first sample appears while it is generated
            sys.stdout.flush()

        sys.stdout.write(self.separator + decode(batch))
        self.separator = "---\n"
        pl_module.on_new_tokens = write

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        decode = trainer.datamodule.tokenizer.decode
        for sample in outputs[1:]:
            sys.stdout.write(f"\n{self.separator}{decode(batch)}{decode(sample)}")
        sys.stdout.write("\n")
        sys.stdout.flush()
