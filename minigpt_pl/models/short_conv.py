"""Short causal convolutions, one before each branch of a block: they add the last few positions at little cost.

Where they are used is in `blocks` and `gpt`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minigpt_pl.models.attention import KVCache


def causal_depthwise_conv(padded: Tensor, weight: Tensor) -> Tensor:
    """x (B, T, C) plus a weighted sum of its last K positions, channel by channel.

    padded (B, K - 1 + T, C) begins with what came before x; row j of weight (K, C) is for j positions back.
    """
    reach = len(weight) - 1
    y = padded[:, reach:] * (1 + weight[0])
    for back in range(1, len(weight)):
        y.addcmul_(padded[:, reach - back : -back], weight[back])
    return y


class CausalDepthwiseConv(torch.autograd.Function):
    """`causal_depthwise_conv` with a gradient in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        return causal_depthwise_conv(padded, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        padded, weight = ctx.saved_tensors
        reach, dpadded, dweight = len(weight) - 1, torch.zeros_like(padded), torch.empty_like(weight)
        dpadded[:, reach:] = dy
        for back in range(len(weight)):
            window = slice(reach - back, padded.size(1) - back)
            dpadded[:, window].addcmul_(dy, weight[back])
            dweight[back] = (dy * padded[:, window]).sum((0, 1))
        return dpadded, dweight


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
        padded = torch.cat([x.new_zeros(x.size(0), len(self.weight) - 1, x.size(2)), x], 1)
        if cache is not None:
            cache.conv_state[self] = padded[:, x.size(1) :]  # (B, K - 1, C)
        return CausalDepthwiseConv.apply(padded, self.weight)
