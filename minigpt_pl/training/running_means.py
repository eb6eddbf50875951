"""Means of what each training step computes, kept on the device: reading a number would wait for it in every step.

`language_model` adds to them and logs them; `metrics` saves them with a checkpoint.
"""

from typing import Any

import torch
from torch import Tensor


class RunningMeans:
    """The loss, the balance loss, the gradient norm and the experts' use since the last log.

    Not a module with buffers: DDP would overwrite them with those of the first process.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(3)
        self.routing: Tensor | None = None
        """Sum over micro-batches of each layer's shares and mean probabilities of the experts, (layers, 2, E)."""
        self.micro_batches, self.steps, self.routed = 0, 0, 0

    def to(self, device: torch.device) -> None:
        self.sums = self.sums.to(device)

    def reset(self) -> None:
        self.sums.zero_()
        self.routing = None
        self.micro_batches, self.steps, self.routed = 0, 0, 0

    def add_losses(self, loss: Tensor, aux_loss: Tensor) -> None:
        """Of a micro-batch."""
        self.sums[:2].add_(torch.stack([loss, aux_loss]).detach())
        self.micro_batches += 1

    def add_routing(self, routing: Tensor) -> None:
        """Of a micro-batch: how each layer used its experts, (layers, 2, E)."""
        self.routing = routing if self.routing is None else self.routing.add_(routing)
        self.routed += 1

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

    def mean_routing(self, strategy: Any) -> Tensor | None:
        """Mean of what `add_routing` was given, over all processes, (layers, 2, E); None if that is nothing."""
        if self.routing is None:
            return None
        mean: Tensor = strategy.reduce(self.routing / self.routed, reduce_op="mean")
        return mean

    def state(self, strategy: Any) -> dict[str, Any]:
        """Plain values for a checkpoint, those of all processes."""
        routing = [] if self.routing is None else strategy.all_gather(self.routing).view(-1, *self.routing.shape)
        return {
            "unlogged": [self.micro_batches, self.steps],
            "running_sums": strategy.all_gather(self.sums).view(-1, len(self.sums)).tolist(),
            "routed": self.routed,
            "routing": routing if isinstance(routing, list) else routing.tolist(),
        }

    def restore(self, state: dict[str, Any], rank: int, processes: int) -> None:
        """Continues from `state`, which other processes may have written: then each takes their mean."""

        def mine(saved: list[Any]) -> Tensor:
            parts = torch.tensor(saved, device=self.sums.device)
            return parts[rank] if len(parts) == processes else parts.mean(0)

        self.sums.copy_(mine(state["running_sums"]))
        self.micro_batches, self.steps = state["unlogged"]
        self.routed = state.get("routed", 0)  # older checkpoints have none
        self.routing = mine(state["routing"]) if self.routed else None
