"""What several callbacks need: where a step ends, when an evaluation is due, and the seeds of dropout.

Each kind of work has its own file: `metrics`, `progress`, `stopping`, `checkpointing`, `summary`, `sampling`.
"""

from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from minigpt_pl.runtime.seeding import derive_seed

CallbackType = TypeVar("CallbackType", bound=Callback)


def get_callback(trainer: Any, cls: type[CallbackType]) -> CallbackType:
    """The trainer's callback of a class, which must be there."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, cls))


def is_step_boundary(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch is the last one of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def eval_due(trainer: Any) -> bool:
    """Whether an evaluation follows the step that has just ended: at a multiple of eval_every, and at the last step."""
    return trainer.global_step % trainer.datamodule.config.eval_every == 0 or trainer.should_stop


class StepSeeder(Callback):
    """Makes dropout a pure function of (seed, step, micro-batch, rank): a resumed run draws the same masks."""

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        purpose = ("dropout", trainer.global_step, micro_batch, trainer.global_rank)
        seed = derive_seed(trainer.datamodule.config.seed, *purpose, size=7)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow: it formats a stack trace for CUDA
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif pl_module.device.type == "mps":
            torch.mps.manual_seed(seed)
