"""Dropout. The masks that a CPU draws faster than torch does are in `cpu_ops`."""

from torch import Tensor, nn
from torch.nn import functional as F

from minigpt_pl.models.cpu_ops import dropout_mask, use_cpu_ops


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
