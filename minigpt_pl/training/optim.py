"""How weights are updated: parameter groups, one optimizer object, the learning rate as a pure function of the step.

No Lightning here: `modules` asks for both.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["adamw", "muon"]
LRSchedule = Literal["cosine", "constant"]


def build_optimizer(
    model: nn.Module, lr: float, weight_decay: float, rule: OptimizerName = "adamw"
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with torch's betas and eps, or Muon with such an AdamW.

    Args:
        model: Each of its parameters is in exactly one group.
        lr: Peak learning rate of every group, until it is set for a step.
        weight_decay: On every parameter.
        rule: adamw updates every parameter; muon leaves it embeddings, head, router and vectors, and updates the
            matrices inside the blocks itself.
    """
    parameters = list(model.parameters())
    optimizer: torch.optim.AdamW
    if rule == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    else:
        matrices = [p for name, p in model.named_parameters() if is_muon_parameter(name, p)]
        chosen = {id(p) for p in matrices}
        groups = [
            {"params": matrices, "use_muon": True},
            {"params": [p for p in parameters if id(p) not in chosen], "use_muon": False},
        ]
        optimizer = Muon(groups, lr=lr, weight_decay=weight_decay, fused=True)
    check_param_groups(optimizer, parameters)
    return optimizer


def is_muon_parameter(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: a matrix that maps vectors to vectors, or one for each expert, inside a block."""
    return name.startswith("blocks.") and name.endswith(MUON_WEIGHTS)


MUON_WEIGHTS = ("qkv.weight", "out.weight", "up.weight", "gate_up.weight", "gate_up", "down.weight", "down")


def check_param_groups(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in parameters), "each parameter belongs to exactly one group"


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for groups with `orthogonalise`; AdamW for others.

    A matrix (o, i) moves along its Nesterov momentum, made orthogonal and times lr * sqrt(max(1, o / i)); each of a
    stack (E, o, i) does. Within that length rows that have long moved further than others are held back, as in NorMuon
    (Li et al., arXiv 2510.05491).
    """

    momentum, memory = 0.95, 0.95

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["use_muon"]:
                self._orthogonal_step(group)
        super().step()  # passes by what has no gradient
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        same: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}  # one product for all matrices of a shape
        for p in group["params"]:
            if p.grad is not None:
                same.setdefault(p.shape, []).append((p, p.grad))
        for shape, matrices in same.items():
            states = [self.state[p] for p, _ in matrices]
            for (p, _), state in zip(matrices, states, strict=True):
                if not state:
                    state["step"] = torch.zeros(())  # AdamW loads no state without
                    state["momentum"], state["rows"] = torch.zeros_like(p), torch.zeros_like(p[..., :1])
                p.grad = None
            momenta = [state["momentum"] for state in states]
            gradients: list[Tensor] = [gradient for _, gradient in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
            torch._foreach_lerp_(gradients, momenta, self.momentum)
            updates = newton_schulz(torch.stack(gradients))
            rows = updates.square().mean(-1, keepdim=True)
            torch._foreach_lerp_([state["rows"] for state in states], rows.unbind(), 1 - self.memory)
            even = updates * torch.stack([state["rows"] for state in states]).clamp_(min=1e-16).rsqrt_()
            even *= frobenius_norm(updates) / frobenius_norm(even).clamp(min=1e-7)
            rate = group["lr"] * math.sqrt(max(1, shape[-2] / shape[-1]))
            parameters: list[Tensor] = [p for p, _ in matrices]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, even.unbind(), alpha=-rate)


def frobenius_norm(matrices: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)


def newton_schulz(matrices: Tensor) -> Tensor:
    """Matrices (..., o, i) with their singular vectors and with singular values near 1, between about 0.7 and 1.2.

    Five times X <- P X with P = a + b XX' + c (XX')^2. All P commute, so that they and XX' are multiplied up as
    matrices of the shorter side squared, and X comes in once, at the end.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steepest at 0
    x = matrices.mT if matrices.size(-2) > matrices.size(-1) else matrices
    x = x / (frobenius_norm(x) + 1e-7)
    gram = x @ x.mT
    product: Tensor | None = None
    for turns_left in reversed(range(5)):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if turns_left:
            gram = factor @ gram @ factor
    assert product is not None
    x = product @ x
    return x.mT if matrices.size(-2) > matrices.size(-1) else x


def lr_factor(schedule: LRSchedule, step: int, max_steps: int) -> float:
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
