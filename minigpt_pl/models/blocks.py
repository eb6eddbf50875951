"""What a block has beside attention: norm, feed-forward networks, and the block itself.

The experts are in `moe`, the models in `gpt`.

Shapes: B batch, T positions, C = n_embd, F hidden width of a feed-forward network.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt_pl.models.attention import KVCache
from minigpt_pl.models.config import GELU
from minigpt_pl.models.cpu_ops import CPURMSNorm, CPUSwiGLU, inverse_rms, use_cpu_ops
from minigpt_pl.models.dropout import Dropout


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang & Sennrich, arXiv 1910.07467)."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., C) by the fastest way on its device."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled():
        return CPURMSNorm.apply(x, weight, eps)
    return x * inverse_rms(x, eps) * weight


class MLP(nn.Module):
    """GPT-2's feed-forward network: hidden width 4 C, GELU (Hendrycks & Gimpel, arXiv 1606.08415).

    Args:
        n_embd: Width C.
        gelu: GELU by the error function, or GPT-2's approximation of it by tanh.
    """

    def __init__(self, n_embd: int, gelu: GELU = "tanh"):
        super().__init__()
        self.gelu = gelu
        self.up = nn.Linear(n_embd, 4 * n_embd)
        self.down = nn.Linear(4 * n_embd, n_embd)

    def matrices(self) -> list[Tensor]:
        """The weight matrices; the last one writes to the residual stream."""
        return [self.up.weight, self.down.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.gelu == "tanh" else "none"))


class SwiGLU(nn.Module):
    """Gated feed-forward network, down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202), without biases.

    Args:
        n_embd: Width C.
        hidden: Width F of gate and up, which are one projection, gate first.
    """

    def __init__(self, n_embd: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def matrices(self) -> list[Tensor]:
        """The weight matrices; the last one writes to the residual stream."""
        return [self.gate_up.weight, self.down.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2 F), gate first -> (..., F)."""
    if use_cpu_ops(gate_up) and torch.is_grad_enabled():
        return CPUSwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x)); dropout on both branches.

    A feed-forward network may return (y, balance loss), as `moe.MoE` does; the block passes that loss on, else None.
    Where there are short convolutions, they lie between the norm and its branch. Without `attention_output_dropout`,
    only the second branch has dropout. A block without attention has neither its norm nor its convolution.
    """

    def __init__(
        self,
        norm_1: nn.Module | None,
        attention: nn.Module | None,
        norm_2: nn.Module,
        feed_forward: nn.Module,
        dropout: float,
        conv_1: nn.Module | None = None,
        conv_2: nn.Module | None = None,
        *,
        attention_output_dropout: bool = True,
    ):
        super().__init__()
        self.norm_1 = norm_1
        self.conv_1 = conv_1
        self.attention = attention
        self.norm_2 = norm_2
        self.conv_2 = conv_2
        self.feed_forward = feed_forward
        self.dropout = Dropout(dropout)
        self.attention_output_dropout = attention_output_dropout

    def forward(self, x: Tensor, cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        if self.attention is not None and self.norm_1 is not None:
            y = self.norm_1(x)  # (B, T, C)
            if self.conv_1 is not None:
                y = self.conv_1(y, cache)
            y = self.attention(y, cache)
            x = x + (self.dropout(y) if self.attention_output_dropout else y)
        y = self.norm_2(x)
        if self.conv_2 is not None:
            y = self.conv_2(y, cache)
        y = self.feed_forward(y)
        y, aux_loss = y if isinstance(y, tuple) else (y, None)
        return x + self.dropout(y), aux_loss
