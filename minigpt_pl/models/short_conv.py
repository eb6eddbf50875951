"""Short causal convolutions, one before each branch of a block: they add the last few positions at little cost.

Where they are used is in `blocks` and `gpt`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt_pl.models.attention import KVCache


def causal_depthwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, T, C) plus a weighted sum of its last K positions, channel by channel; before the first one are zeros.

    Row j of weight (K, C) is for j positions back.
    """
    y = x * (1 + weight[0])
    for back in range(1, len(weight)):
        y[:, back:].addcmul_(x[:, :-back], weight[back])
    return y


class CausalDepthwiseConv(torch.autograd.Function):
    """`causal_depthwise_conv` with a gradient in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return causal_depthwise_conv(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx, dweight = dy * (1 + weight[0]), torch.empty_like(weight)
        dweight[0] = (dy * x).sum((0, 1))
        for back in range(1, len(weight)):
            dx[:, :-back].addcmul_(dy[:, back:], weight[back])
            dweight[back] = (dy[:, back:] * x[:, :-back]).sum((0, 1))
        return dx, dweight


class ShortConv(nn.Module):
    """x plus a causal depthwise convolution of it (a "Canon layer", Allen-Zhu 2025).

    Args:
        n_embd: Width C.
        kernel_size: Positions K in the sum, the present one included.
    """

    def __init__(self, n_embd: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel_size, n_embd))

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        if cache is not None:
            cache.conv_state[self] = F.pad(x, (0, 0, len(self.weight) - 1, 0))[:, x.size(1) :]  # (B, K - 1, C)
        return CausalDepthwiseConv.apply(x, self.weight)
