"""Means of what each training step computes, kept on the device: reading a number would wait for it in every step.

`language_model` adds to them and logs them; `metrics` saves them with a checkpoint.
"""

from typing import Any

import torch
from torch import Tensor


class RunningMeans:
    """The loss, the balance loss and the gradient norm since the last log.

    Not a module with buffers: DDP would overwrite them with those of the first process.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(3)
        self.micro_batches, self.steps = 0, 0

    def to(self, device: torch.device) -> None:
        self.sums = self.sums.to(device)

    def reset(self) -> None:
        self.sums.zero_()
        self.micro_batches, self.steps = 0, 0

    def add_losses(self, loss: Tensor, aux_loss: Tensor) -> None:
        """Of a micro-batch."""
        self.sums[:2].add_(torch.stack([loss, aux_loss]).detach())
        self.micro_batches += 1

    def add_grad_norm(self, norm: Tensor) -> None:
        """Of an optimizer step."""
        self.sums[2].add_(norm)
        self.steps += 1

    def compute(self, strategy: Any) -> list[float]:
        """The three means over all processes of a Lightning strategy. This waits for the device."""
        sums = strategy.reduce(self.sums.clone(), reduce_op="mean")
        counts = sums.new_tensor([self.micro_batches, self.micro_batches, self.steps]).clamp(min=1)
        means: list[float] = (sums / counts).tolist()
        return means
