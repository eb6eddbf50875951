"""Short causal convolutions, which a block may have before its branches: what stood just before, at hardly any cost.

Where they go is in `layers` and `models`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minigpt_pl.models.attention import KVCache


class CausalDepthwiseConv(torch.autograd.Function):
    """x plus its last positions, weighed; forward and backward in few passes over memory.

    padded (B, K - 1 + T, C) has what came before x; row j of weight (K, C) is for the position j back.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        reach = len(weight) - 1
        y = padded[:, reach:] * (1 + weight[0])
        for back in range(1, len(weight)):
            y.addcmul_(padded[:, reach - back : -back], weight[back])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        padded, weight = ctx.saved_tensors
        reach, dpadded, dweight = len(weight) - 1, torch.zeros_like(padded), torch.empty_like(weight)
        dpadded[:, reach:] = dy
        for back in range(len(weight)):
            place = slice(reach - back, padded.size(1) - back)
            dpadded[:, place].addcmul_(dy, weight[back])
            dweight[back] = (dy * padded[:, place]).sum((0, 1))
        return dpadded, dweight


class ShortConv(nn.Module):
    """x plus a weighted sum of its last few positions, channel by channel (a "Canon layer", Allen-Zhu 2025).

    Args:
        n_embd: Width C.
        width: Positions in the sum, the present one included.
    """

    def __init__(self, n_embd: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, n_embd))

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        padded = torch.cat([x.new_zeros(x.size(0), len(self.weight) - 1, x.size(2)), x], 1)
        if cache is not None:
            cache.conv_state[self] = padded[:, x.size(1) :]
        return CausalDepthwiseConv.apply(padded, self.weight)
