"""How weights are updated: the optimizer's options, parameter groups, AdamW and Muon, the learning-rate schedule.

The schedule is a pure function of the step. `language_model` hands it to Lightning.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from minigpt_pl.models.gpt import GPT
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.ranges import NonNegativeFinite, NonNegativeInt, PositiveFinite

OptimizerName = Literal["adamw", "muon"]
LRSchedule = Literal["cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a model is trained.

    Args:
        lr: Peak learning rate; with muon, that of all but Muon's matrices.
        weight_decay: Weight decay of every parameter.
        lr_schedule: cosine, after a warm-up, or constant.
        warmup_steps: Updates in the warm-up; null for max(50, max_steps // 20).
        optimizer: adamw, or muon for the matrices in blocks and adamw for the rest.
        muon_lr: Peak learning rate of Muon's matrices.
    """

    lr: PositiveFinite
    weight_decay: NonNegativeFinite
    lr_schedule: LRSchedule = "cosine"
    warmup_steps: NonNegativeInt | None = None
    optimizer: OptimizerName = "muon"
    muon_lr: PositiveFinite = 0.01


def build_optimizer(model: GPT, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with torch's betas and eps, or Muon beside such an AdamW.

    Lightning's automatic optimization takes one optimizer, so Muon and AdamW are groups of one object.

    Args:
        model: Each of its parameters is in exactly one group.
        config: The options.
    """
    parameters = list(model.parameters())
    optimizer: torch.optim.AdamW
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    else:
        matrices = model.matrices()
        chosen = set(map(id, matrices))
        others = [p for p in parameters if id(p) not in chosen]
        groups = [
            {"params": matrices, "use_muon": True, "lr": config.muon_lr},
            {"params": others, "use_muon": False, "lr": config.lr},
        ]
        optimizer = Muon(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    check_param_groups(optimizer, parameters)
    return optimizer


def check_param_groups(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in parameters), "each parameter belongs to exactly one group"


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for groups with `use_muon`; AdamW for the others.

    A matrix (o, i) moves along its Nesterov momentum, orthogonalised and times lr * sqrt(max(1, o / i)); so does each
    matrix of a stack (E, o, i). Within that length, rows that have long moved further than others are scaled down, as
    in NorMuon (Li et al., arXiv 2510.05491).
    """

    momentum, beta2 = 0.95, 0.95

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["use_muon"]:
                self._muon_step(group)
        super().step()  # skips parameters without a gradient, so those that _muon_step has updated
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}  # one product for all matrices of a shape
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        parameters = [p for alike in by_shape.values() for p in alike]
        if not parameters:  # as in a model of the user that has no such matrices
            return
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros(())  # AdamW refuses to load a state without it
                self.state[p]["momentum"] = torch.zeros_like(p)
                self.state[p]["row_variance"] = torch.zeros_like(p[..., :1])
        momenta: list[Tensor] = [self.state[p]["momentum"] for p in parameters]
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        torch._foreach_lerp_(gradients, momenta, self.momentum)  # Nesterov
        stacks = [torch.stack([p.grad for p in alike if p.grad is not None]) for alike in by_shape.values()]
        for p in parameters:
            p.grad = None
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for (shape, alike), updates in zip(by_shape.items(), orthogonalize(*stacks), strict=True):
            row_variances = [self.state[p]["row_variance"] for p in alike]
            updates *= even_rows(updates, row_variances, self.beta2)
            rate = group["lr"] * math.sqrt(max(1, shape[-2] / shape[-1]))
            torch._foreach_add_(alike, updates.unbind(), alpha=-rate)


def even_rows(updates: Tensor, row_variances: list[Tensor], beta2: float) -> Tensor:
    """Factors (n, ..., o, 1) of the rows of updates (n, ..., o, i): NorMuon's, with which no matrix changes its length.

    Args:
        updates: Matrices of one shape.
        row_variances: The running mean square of each matrix's rows, (..., o, 1) each; they are updated.
        beta2: How much of them stays.
    """
    row_means = updates.square().mean(-1, keepdim=True)  # (n, ..., o, 1)
    torch._foreach_lerp_(row_variances, row_means.unbind(), 1 - beta2)
    variances = torch.stack(row_variances).clamp_(min=1e-16)
    scaled_means = (row_means / variances).mean(-2, keepdim=True).clamp_(min=1e-14)
    return (row_means.mean(-2, keepdim=True) / scaled_means / variances).sqrt_()


ORTHOGONALIZING_POLYNOMIALS = (
    (7.7110, -22.1138, 16.2487),
    (3.2153, -2.4112, 0.5013),
    (2.2183, -1.5940, 0.4107),
)
"""Each maps x to a x + b x^3 + c x^5. In this order they bring all of [0.02, 1] nearer to 1 than any others can."""


def orthogonalize(*stacks: Tensor) -> list[Tensor]:
    """Matrices (..., o, i) with their singular vectors kept, and singular values between 0.9 and 1.1.

    Values below a fiftieth of (sum of their eighth powers)^(1/8), which is at least the largest, stay smaller.

    The method is Polar Express (Amsel et al., arXiv 2505.16932): X <- P X with P = a + b XX' + c (XX')^2, and the best
    coefficients for each iteration. All P are polynomials in XX' and commute, so `inverse_root` multiplies only
    matrices of the shorter side squared, those of all stacks at once, and X is multiplied once, at the end.

    Args:
        stacks: Matrices of one shape each.
    """
    wide = [stack.mT if stack.size(-2) > stack.size(-1) else stack for stack in stacks]
    grams = [x @ x.mT for x in wide]
    roots: dict[int, Tensor] = {}
    for side in {x.size(-2) for x in wide}:
        alike = [i for i, x in enumerate(wide) if x.size(-2) == side]
        flat = [grams[i].reshape(-1, side, side) for i in alike]
        parts = inverse_root(torch.cat(flat)).split([len(part) for part in flat])
        roots |= {i: part.view_as(grams[i]) for i, part in zip(alike, parts, strict=True)}
    results = [roots[i] @ x for i, x in enumerate(wide)]
    return [x.mT if stack.size(-2) > stack.size(-1) else x for stack, x in zip(stacks, results, strict=True)]


def inverse_root(gram: Tensor) -> Tensor:
    """Approximately (XX')^(-1/2) of each gram = XX' (n, s, s), which is overwritten; see `orthogonalize`.

    gram^2, which is needed anyway, also bounds the largest singular value so closely that three iterations suffice.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + 1e-30  # so that nothing below underflows
    gram /= trace
    square = gram @ gram
    bound = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).sqrt_().clamp_(min=1e-6) * 1.001  # (n, 1, 1)
    gram, square = gram / bound, square / bound.square()
    product: Tensor | None = None
    for i, (a, b, c) in enumerate(ORTHOGONALIZING_POLYNOMIALS, start=1):
        factor = torch.add(b * gram, square, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if i < len(ORTHOGONALIZING_POLYNOMIALS):
            gram = factor @ gram @ factor
            square = gram @ gram
    assert product is not None
    return product.mul_((bound * trace).rsqrt_())  # that root is at least the largest singular value


class StepSchedule(LRScheduler):
    """The peak rate of each group of an optimizer, times `lr_factor` of the step; it keeps no state of its own.

    Args:
        optimizer: Its rates are the peaks.
        config: The options of the schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig):
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.config, self.max_steps = config, 0
        super().__init__(optimizer)

    def start(self, step: int, max_steps: float) -> None:
        """Sets the rates for the update that follows `step` completed ones, of `max_steps` in all.

        Raises:
            UserError: If the schedule falls towards a last step, and there is none.
        """
        if self.config.lr_schedule != "constant" and not 0 < max_steps < math.inf:
            problem, remedy = "it needs the number of steps", "set max_steps or max_epochs, or use constant"
            raise UserError(problem, option="model.lr_schedule", value=self.config.lr_schedule, remedy=remedy)
        self.last_epoch, self.max_steps = step - 1, int(max_steps) if max_steps < math.inf else 0
        for group in self.optimizer.param_groups:  # a checkpoint restores its own, maybe older, value
            group["weight_decay"] = self.config.weight_decay
        self.step()

    def step(self, epoch: int | None = None) -> None:
        """Sets the rates of the next update."""
        self.last_epoch += 1
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def get_lr(self) -> list[float | Tensor]:
        config, factor = self.config, 1.0
        if self.max_steps:
            factor = lr_factor(config.lr_schedule, self.last_epoch, self.max_steps, config.warmup_steps)
        return [factor * peak for peak in self.peaks]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: `start` sets what follows from the step."""


def lr_factor(schedule: LRSchedule, step: int, max_steps: int, warmup_steps: int | None = None) -> float:
    """The factor of the peak learning rate in the update that follows `step` completed ones.

    cosine: linear warm-up over so many updates, then half a cosine down to a tenth at max_steps.
    """
    if schedule == "constant":
        return 1.0
    warmup = max(50, max_steps // 20) if warmup_steps is None else warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
