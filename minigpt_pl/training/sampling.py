"""Text that a model writes: into samples.txt while it learns, onto stdout in `predict`.

How tokens are chosen is in `generation`.
"""

import re
import sys
from pathlib import Path
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer

from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.runtime.atomic_io import SAMPLES_FILE, atomic_write
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.callbacks import is_unscheduled_eval

SAMPLE_HEADER = "=== step "
"""Before each sample in samples.txt, with the step."""


@final
class SampleCallback(Callback):
    """Writes what the model has learned so far to samples.txt. `--samples null` does without.

    Args:
        every_n_evals: Checks between samples.
        prompt: What the samples continue.
        max_new_tokens: Their length.
        temperature: As --sample.temperature of predict.
    """

    def __init__(self, every_n_evals: int, prompt: str = "\n", max_new_tokens: int = 200, temperature: float = 0.8):
        if every_n_evals < 1:
            raise UserError(f"samples.every_n_evals is {every_n_evals}: it must be at least 1")
        self.every_n_evals, self.prompt = every_n_evals, prompt
        self.sampling = SamplingConfig(max_new_tokens, temperature)

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir, SAMPLES_FILE)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        due = trainer.global_step // trainer.datamodule.eval_every % self.every_n_evals == 0
        if trainer.is_global_zero and (due or trainer.global_step >= trainer.max_steps):
            text = generate_sample(trainer, pl_module, self.prompt, self.sampling)
            with self._path(trainer).open("a", encoding="utf-8", newline="") as file:
                file.write(f"{SAMPLE_HEADER}{trainer.global_step}\n{text}\n")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self._path(trainer)
        if trainer.is_global_zero and path.exists():  # what a stopped run wrote after its checkpoint is written again
            last = trainer.global_step - is_unscheduled_eval(trainer)
            kept = [f"{SAMPLE_HEADER}{step}\n{text}\n" for step, text in read_samples(path) if step <= last]
            atomic_write(path, "".join(kept).encode())


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Step and text of each sample in samples.txt, also of those before a resume."""
    content = path.read_bytes().decode() if path.exists() else ""  # as bytes: a text may hold other line ends
    _, *parts = re.split(rf"^{SAMPLE_HEADER}(\d+)\n", content, flags=re.MULTILINE)
    return [(int(step), text.removesuffix("\n")) for step, text in zip(parts[::2], parts[1::2], strict=True)]


def generate_sample(trainer: Any, pl_module: Any, prompt: str, sampling: SamplingConfig) -> str:
    """A prompt and its continuation, by the model as it is; characters of the prompt that it lacks are left out."""
    tokenizer = trainer.datamodule.tokenizer
    known = "".join(c for c in prompt if c in set("".join(tokenizer.vocabulary)))
    ids = tokenizer.encode(known or tokenizer.vocabulary[0]).tolist()
    training = pl_module.net.training
    pl_module.net.eval()
    tokens = [token for (token,) in generate(pl_module.net, ids, sampling)]
    pl_module.net.train(training)
    return known + tokenizer.decode(tokens)


class PredictionWriter(Callback):
    """predict: prompts and their continuations on stdout, as they are generated, and nothing else."""

    def __init__(self) -> None:
        self._first = True

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        tokenizer = trainer.datamodule.tokenizer
        prompt = trainer.datamodule.prompts[batch_idx] or tokenizer.decode(batch)
        finished: list[list[int]] = [[] for _ in range(pl_module.sampling.num_samples)]
        self._begin(prompt)
        for tokens in outputs:
            sys.stdout.write(tokenizer.decode(tokens[:1]))
            sys.stdout.flush()
            for stream, token in zip(finished, tokens, strict=True):
                stream.append(token)
        for stream in finished[1:]:
            sys.stdout.write("\n")
            self._begin(prompt)
            sys.stdout.write(tokenizer.decode(stream))
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _begin(self, prompt: str) -> None:
        sys.stdout.write(prompt if self._first else f"---\n{prompt}")
        self._first = False


def read_prompts(prompt: str, file: str) -> list[str]:
    """What predict continues: one prompt, or those of a file, one a line."""
    if not file:
        return [prompt]
    if prompt:
        raise UserError("sample.prompt and sample.prompt_file are both given: give one")
    try:
        lines = Path(file).read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"sample.prompt_file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"sample.prompt_file {file} is not UTF-8: byte {error.start}") from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise UserError(f"sample.prompt_file {file} is empty: give one prompt a line")
    return lines
