"""What several callbacks need, and the seeds of dropout.

Each kind of work has its own file: `metrics`, `progress`, `stopping`, `checkpointing`, `summary`, `sampling`.
"""

from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule

from minigpt_pl.runtime.seeding import derive_seed

CallbackType = TypeVar("CallbackType", bound=Callback)


def get_callback(trainer: Any, cls: type[CallbackType]) -> CallbackType:
    """The trainer's callback of a class, which must be there."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, cls))


class StepSeeder(Callback):
    """Makes dropout a pure function of (seed, step, micro-batch, rank): a resumed run draws the same masks.

    Args:
        seed: The seed; by default that of the TextDataModule.
    """

    def __init__(self, seed: int | None = None):
        self.seed = seed

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        purpose = ("dropout", trainer.global_step, micro_batch, trainer.global_rank)
        own_seed = trainer.datamodule.config.seed if self.seed is None else self.seed
        seed = derive_seed(own_seed, *purpose, size=7)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow: it formats a stack trace for CUDA
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif pl_module.device.type == "mps":
            torch.mps.manual_seed(seed)
