"""A sparse mixture of SwiGLU experts: router, balance loss, dispatch, expert load.

Only the experts that a token is sent to are computed, and no token is dropped. Where the balance loss is added to the
training loss is in `training.lit_modules`.

Shapes, as suffixes of names: N tokens, C = n_embd, E experts, K chosen by each token, F hidden width of an expert.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt_pl.models.blocks import swiglu
from minigpt_pl.models.config import RouterGate


class MoE(nn.Module):
    """Top-k mixture of experts; returns (y, balance loss), the latter None where no gradients are computed.

    Args:
        n_embd: Width C.
        hidden: Hidden width F of one expert.
        n_experts: Experts E.
        top_k: Experts K that each token is sent to.
        gate: softmax_all weights the chosen experts by the softmax over all experts (Switch, arXiv 2101.03961), so that
            the router learns from the language-model loss even at top_k 1. softmax_selected weights them by the softmax
            over the chosen ones (Mixtral, arXiv 2401.04088), which at top_k 1 is the constant 1.
    """

    def __init__(self, n_embd: int, hidden: int, n_experts: int, top_k: int, gate: RouterGate):
        super().__init__()
        if gate not in ("softmax_all", "softmax_selected"):
            raise ValueError(f"moe_gate is {gate}: it must be softmax_all or softmax_selected")
        self.n_experts, self.top_k, self.gate = n_experts, top_k, gate
        self.router = nn.Linear(n_embd, n_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * hidden, n_embd))
        self.down = nn.Parameter(torch.empty(n_experts, n_embd, hidden))
        self.last_routing: tuple[Tensor, Tensor] | None = None
        """Of the last training pass, detached: share of the token-expert pairs (E,), mean router probability (E,)."""

    def matrices(self) -> list[Tensor]:
        """The experts' weight matrices, stacked; the last ones write to the residual stream."""
        return [self.gate_up, self.down]

    def route(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights (N, K) and indices (N, K) of the chosen experts, and the balance loss, None without gradients.

        The balance loss is E * sum_e(share_e * mean probability_e): 1 when all experts have equal shares, E when one
        expert has all. Only the probabilities have a gradient; the shares are counts.
        """
        logits_NE = self.router(x_NC).float()  # fp32: a softmax in bf16 would tie experts that differ
        weights_NK, chosen_NK = topk_route(logits_NE, self.top_k, self.gate)
        if not torch.is_grad_enabled():  # evaluation and generation do not use the balance loss
            return weights_NK, chosen_NK, None
        share_E = self.expert_counts(chosen_NK).float() / chosen_NK.numel()
        mean_E = logits_NE.softmax(-1).mean(0)
        self.last_routing = share_E, mean_E.detach()
        return weights_NK, chosen_NK, self.n_experts * (share_E * mean_E).sum()

    def expert_counts(self, chosen_NK: Tensor) -> Tensor:
        """Token-expert pairs of each expert (E,). Unlike bincount this never waits for the device."""
        return (chosen_NK.unsqueeze(-1) == torch.arange(self.n_experts, device=chosen_NK.device)).sum((0, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x_NC = x.flatten(0, -2)
        weights_NK, chosen_NK, aux_loss = self.route(x_NC)
        return self.dispatch(x_NC, weights_NK, chosen_NK).view_as(x), aux_loss

    @torch.compiler.disable  # the compiler supports the grouped product in bf16 only
    def dispatch(self, x_NC: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """Each token's weighted sum of its chosen experts' outputs, (N, C).

        Token-expert pairs are sorted by expert, so that each expert multiplies one contiguous group of rows.
        """
        order = chosen_NK.flatten().argsort(stable=True)  # (N * K,); stable, so that a step can be repeated exactly
        sorted_x, counts_E = x_NC.index_select(0, order // self.top_k), self.expert_counts(chosen_NK)  # (N * K, C)
        sorted_x, gate_up, down = autocast_tensors(sorted_x, self.gate_up, self.down)
        grouped = supports_grouped_mm(sorted_x, gate_up, down)
        counts = counts_E if grouped else counts_E.tolist()  # the list is the one wait for the device in a layer
        sorted_y = grouped_linear(swiglu(grouped_linear(sorted_x, gate_up, counts)), down, counts)  # (N * K, C)
        y_NKC = torch.empty_like(sorted_y).index_copy(0, order, sorted_y).view(*chosen_NK.shape, -1)
        weighted_NKC = y_NKC * weights_NK.unsqueeze(-1).type_as(y_NKC)
        return weighted_NKC.squeeze(1) if self.top_k == 1 else weighted_NKC.sum(1)


def topk_route(logits_NE: Tensor, top_k: int, gate: RouterGate) -> tuple[Tensor, Tensor]:
    """Weights (N, K) and indices (N, K) of the experts that the router's logits choose, the most likely first."""
    if gate == "softmax_selected":
        chosen_logits_NK, chosen_NK = logits_NE.topk(top_k, sorted=True)
        return chosen_logits_NK.softmax(-1), chosen_NK
    weights_NK, chosen_NK = logits_NE.softmax(-1).topk(top_k, sorted=True)
    return weights_NK, chosen_NK


def autocast_tensors(*factors: Tensor) -> Iterator[Tensor]:
    """The factors of a grouped product in autocast's dtype: autocast itself does not cover grouped products."""
    device = factors[0].device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return (factor.to(torch.get_autocast_dtype(device)) if enabled else factor for factor in factors)


def supports_grouped_mm(rows: Tensor, *weights: Tensor) -> bool:
    """Whether torch multiplies groups of such rows by such matrices (E, o, i) in one call."""
    strides_fit = all(size * rows.element_size() % 16 == 0 for weight in weights for size in weight.shape[1:])
    dtypes_fit = all(rows.dtype == weight.dtype for weight in weights) and rows.dtype != torch.float64
    return strides_fit and dtypes_fit and rows.device.type in ("cpu", "cuda")


def grouped_linear(rows: Tensor, weights: Tensor, counts: Tensor | list[int]) -> Tensor:
    """Products of consecutive groups of rows (n, i) with one matrix each.

    Args:
        rows: Sorted by group.
        weights: One matrix (o, i) for each group, (E, o, i).
        counts: Rows in each group: a tensor (E,) on the device for one grouped product, else a list.
    """
    if isinstance(counts, Tensor):
        return F.grouped_mm(rows, weights.mT, offs=counts.cumsum(0).to(torch.int32))
    groups = rows.split(counts)
    return torch.cat([F.linear(group, weight) for group, weight in zip(groups, weights, strict=True)])
