"""How weights are updated: parameter groups, one optimizer object, the learning rate as a pure function of the step.

No Lightning here: `modules` asks for both.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

Schedule = Literal["cosine", "constant"]


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with torch's betas and eps, over every parameter of the model.

    Args:
        model: Each of its parameters is in exactly one group.
        lr: Peak learning rate; `lr_factor` scales it.
        weight_decay: On every parameter.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    check_exhaustive(optimizer, parameters)
    return optimizer


def check_exhaustive(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in parameters), "each parameter belongs to exactly one group"


def lr_factor(schedule: Schedule, step: int, max_steps: int) -> float:
    """What the peak learning rate is multiplied by in the update that follows `step` completed ones.

    cosine: linear warm-up over max(50, max_steps // 20) updates, then half a cosine down to a tenth at max_steps.
    """
    if schedule == "constant":
        return 1.0
    warmup = max(50, max_steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
