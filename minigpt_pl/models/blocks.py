"""What a block has beside attention: the norm, the feed-forward nets, and the block itself.

Pure torch. The experts are in `moe`, the assemblies in `models`.

Shapes: B batch, T positions, C = n_embd, F hidden width of a feed-forward net.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt_pl.models.attention import KVCache
from minigpt_pl.models.dropout import Dropout


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich, arXiv 1910.07467); torch's own but on a CPU."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What RMSNorm computes of x (..., C), by the quickest way there is."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled():
        return CPURMSNorm.apply(x, weight, eps)
    return x * inverse_rms(x, eps) * weight


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean square + eps) over the last dimension of (..., C), as (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(torch.scalar_tensor(eps), norm, norm, value=1 / x.size(-1)).rsqrt_()


class CPURMSNorm(torch.autograd.Function):
    """RMSNorm in few passes over memory, of which torch makes about twice as many on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        product = dy * unit
        mean = (product @ weight).unsqueeze(-1).div_(unit.size(-1))
        dx = (dy * weight).addcmul_(unit, mean, value=-1).mul_(scale)
        return dx, product.flatten(0, -2).sum(0), None


class MLP(nn.Module):
    """GPT-2's feed-forward net: four times as wide, GELU in its tanh form."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.up = nn.Linear(n_embd, 4 * n_embd)
        self.down = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Gated feed-forward net, down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202); no biases.

    Args:
        n_embd: Width C.
        hidden: Width F of gate and up, which are one product, gate first.
    """

    def __init__(self, n_embd: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2 F), gate first -> (..., F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x)); dropout on both branches.

    A feed-forward net may return (y, aux loss); the block passes the aux loss on, and None for the others. Short
    convolutions, where there are any, lie between norm and branch.
    """

    def __init__(
        self,
        norm_1: nn.Module,
        attention: nn.Module,
        norm_2: nn.Module,
        feed_forward: nn.Module,
        dropout: float,
        conv_1: nn.Module | None = None,
        conv_2: nn.Module | None = None,
    ):
        super().__init__()
        self.norm_1 = norm_1
        self.conv_1 = conv_1
        self.attention = attention
        self.norm_2 = norm_2
        self.conv_2 = conv_2
        self.feed_forward = feed_forward
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        y = self.norm_1(x)
        if self.conv_1 is not None:
            y = self.conv_1(y, cache)
        x = x + self.dropout(self.attention(y, cache))
        y = self.norm_2(x)
        if self.conv_2 is not None:
            y = self.conv_2(y, cache)
        y = self.feed_forward(y)
        y, aux = y if isinstance(y, tuple) else (y, None)
        return x + self.dropout(y), aux
