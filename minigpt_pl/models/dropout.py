"""Dropout, and masks drawn quickly where torch draws them slowly.

Where a model has dropout is in `attention`, `layers` and `models`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def use_cpu_ops(x: Tensor) -> bool:
    """Whether torch's own way is slow and ours taken: it draws masks on one thread, which costs a third of a step."""
    known = x.dtype in (torch.float32, torch.bfloat16)
    return x.device.type == "cpu" and known and not torch.compiler.is_compiling()


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """1 / (1 - p) where an element stays and 0 where it goes, for a tensor on the CPU; p is kept to 16 bits.

    Four elements share one 64-bit number of the default generator. The full range must be asked for: `random_()` alone
    leaves the top bit of each number unset.
    """
    count = like.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    stays = torch.empty_like(like)  # 0 or 1, without a pass over booleans
    torch.ge(bits.view(torch.int16)[:count].view(like.shape), min(round(p * 2**16), 2**16 - 1) - 2**15, out=stays)
    return stays.mul_(1 / (1 - p))


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014): zeroes with probability p while training, scales the rest up."""

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout is {p}: it must be at least 0 and below 1")
        self.p = p

    @property
    def is_active(self) -> bool:
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_active:
            return x
        return x * dropout_mask(x, self.p) if use_cpu_ops(x) else F.dropout(x, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
