"""Distillation: a model that learns from the text, and from what trained models predict there.

Which runs are the teachers is decided by the user; they are trained before, as any other run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import functional as F

from minigpt_pl.checkpoint.io import BEST_CKPT, read_checkpoint
from minigpt_pl.models.gpt import GPT
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.paths import expand_home
from minigpt_pl.runtime.ranges import Probability
from minigpt_pl.training.language_model import LanguageModel, from_checkpoint


class Distillation(Callback):
    """Replaces the loss that is minimised by a mix of two: the cross-entropy with the text, and with the teachers.

    The teachers' prediction is the mean of their probabilities (Hinton et al. 2015, arXiv 1503.02531, at temperature 1;
    several teachers as in arXiv 2509.14786). They read the same inputs as the model, replaced tokens included, in eval
    mode. They are no part of the model: no checkpoint contains them, and a resumed run reads them again. `train/loss`
    stays the cross-entropy with the text.

    Args:
        teachers: Checkpoints, or run directories, of which best.ckpt is used.
        weight: Share of the teachers in the loss.
    """

    def __init__(self, teachers: Sequence[str | Path], weight: Probability = 0.5):
        self.paths, self.weight = [str(path) for path in teachers], float(weight)
        self.nets: list[GPT] = []

    def load(self, model: LanguageModel, data: Any) -> None:
        """Reads the teachers of a model that learns from `data`, a TextDataModule or None, unless they are read.

        Raises:
            UserError: If one cannot be used: it is missing, has another vocabulary, or reads less context.
        """
        if not self.nets:
            self.nets = [self._read(path, model, getattr(data, "tokenizer", None)) for path in self.paths]

    def _read(self, name: str, model: LanguageModel, tokenizer: Any) -> GPT:
        def error(problem: str, remedy: str) -> UserError:
            return UserError(f"the teacher {name} cannot be used: {problem}", remedy=remedy)

        path = expand_home(name, "teachers")
        try:
            checkpoint = read_checkpoint(path / BEST_CKPT if path.is_dir() else path)
            teacher = from_checkpoint(checkpoint)
        except UserError as refusal:
            raise error(refusal.problem, refusal.remedy) from refusal
        tokens = checkpoint.get("TextDataModule", {}).get("tokenizer_sha256")
        same_tokens = tokenizer is None or tokens == tokenizer.sha256
        if not same_tokens or teacher.config.vocab_size != model.config.vocab_size:
            raise error("its vocabulary is not that of this run", "train it on the same text, with the same tokenizer")
        if teacher.config.block_size < (size := model.config.block_size):
            problem = f"it reads {teacher.config.block_size} tokens of context, fewer than model.block_size {size}"
            raise error(problem, f"train it with --model.block_size {size}")
        return teacher.net.requires_grad_(False)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.load(pl_module, trainer.datamodule)
            pl_module.minimised_loss = self.loss

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.nets = [net.to(pl_module.device) for net in self.nets]

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.minimised_loss = None

    def loss(self, text_loss: Tensor, inputs: Tensor, logits: Tensor) -> Tensor:
        """The mix, in nats: of the text's cross-entropy, and that of logits (B, T, V) with what teachers predict.

        Args:
            text_loss: The mean cross-entropy with the text, in nats.
            inputs: Token ids (B, T).
            logits: The model's, for the same inputs.
        """
        with torch.no_grad():
            predictions = torch.stack([net(inputs)[0].float().softmax(-1) for net in self.nets]).mean(0)
        teachers_loss = F.cross_entropy(logits.float().flatten(0, 1), predictions.flatten(0, 1))
        return torch.lerp(text_loss, teachers_loss, self.weight)


def read_teachers(trainer: Any, model: LanguageModel, data: Any) -> None:
    """Reads the teachers of a fit, if it has any, before a file is written.

    Raises:
        UserError: If one cannot be used.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, Distillation):
            callback.load(model, data)
