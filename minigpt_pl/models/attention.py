"""Causal self-attention: rotary positions, heads, dropout on the probabilities, the cache of keys and values.

The rest of a block is in `blocks`; what a CPU computes faster by hand in `cpu_ops`.

Shapes: B batch, T positions, C = n_embd, H heads, D = C // H.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt_pl.models.cpu_ops import CPUDropoutAttention, CPUUnitRMS, FusedRotaryQKV, use_cpu_ops
from minigpt_pl.models.dropout import Dropout


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al., arXiv 2104.09864), in the half-split layout of Llama.

    Args:
        head_width: Width D of a head, even.
        block_size: Positions, at most.
        theta: Base of the wavelengths.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, block_size: int, theta: float):
        super().__init__()
        if head_width % 2:
            raise ValueError(f"the head width n_embd / n_head is {head_width}: rotary positions need an even one")
        self.theta = theta
        # Not persistent: they follow from the sizes, so a checkpoint need not hold them.
        cos, sin = rotary_cos_sin(torch.arange(block_size), head_width, theta)  # (T, D)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)


def rotary_cos_sin(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., D) of positions (...), in fp32; the sign of a rotation's first half is in the sines."""
    rates = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device) / head_width)
    angles = positions.float().unsqueeze(-1) * rates  # (..., D / 2)
    # With that sign a rotation is one roll and one addcmul.
    return torch.cat([angles.cos(), angles.cos()], -1), torch.cat([-angles.sin(), angles.sin()], -1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the heads x (..., D) by the angles of `rotary_cos_sin`."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).type_as(x)


class KVCache:
    """Keys and values that one layer has computed so far, and what its short convolutions read last.

    Args:
        size: Positions that it has room for.
    """

    def __init__(self, size: int):
        self.size = size
        self.length = 0
        self.conv_state: dict[nn.Module, Tensor] = {}
        self.kv: Tensor | None = None  # (2, B * H, size, D)

    def extend(self, kv: Tensor) -> tuple[Tensor, ...]:
        """Appends keys and values (2, B * H, T, D) of new positions; returns all of them, (B * H, length, D) each."""
        if self.kv is None:
            self.kv = kv.new_empty(*kv.shape[:2], self.size, kv.shape[3])
        self.kv.narrow(2, self.length, kv.size(2)).copy_(kv)
        self.length += kv.size(2)
        return self.kv.narrow(2, 0, self.length).unbind()


def split_qkv_heads(qkv: Tensor, rope: RotaryEmbedding | None) -> tuple[Tensor, ...]:
    """Queries, keys and values, (B, H, T, D) each, of one projection (B, T, 3, H, D); the first two are rotated."""
    heads = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
    if rope is None:
        return heads.unbind()
    cos, sin = rope.cos[: qkv.size(1)], rope.sin[: qkv.size(1)]  # (T, D)
    if use_cpu_ops(qkv):
        return FusedRotaryQKV.apply(qkv, cos, sin)
    return *apply_rotary(heads[:2], cos, sin).unbind(), heads[2]


def unit_rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain over the last dimension of x (..., D), in its dtype; gain (1,)."""
    if use_cpu_ops(x):
        return CPUUnitRMS.apply(x, gain, eps)
    return (F.rms_norm(x, x.shape[-1:], eps=eps) * gain).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: Dropout) -> Tensor:
    """Causal scaled dot-product attention; q, k, v (B, H, T, D) -> (B, H, T, D)."""
    if dropout.is_active and use_cpu_ops(q):
        return CPUDropoutAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), dropout.p).view_as(q)
    p = dropout.p if dropout.is_active else 0.0
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017) with one projection for queries, keys and values.

    Args:
        n_embd: Width C.
        n_head: Heads H; must divide n_embd.
        dropout: Dropout rate on the attention probabilities.
        bias: Whether the two projections add a bias.
        rope: Rotary positions, or None.
        qk_norm_eps: If given, queries and keys are divided by their root mean square, so that their direction alone
            counts, and times a learned factor that all heads share (after Henry et al., arXiv 2010.04245). This is
            added under the root. A rotation does not change that mean square.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        dropout: float,
        bias: bool,
        rope: RotaryEmbedding | None = None,
        qk_norm_eps: float | None = None,
    ):
        super().__init__()
        self.n_head, self.qk_norm_eps = n_head, qk_norm_eps
        self.qk_gain = None if qk_norm_eps is None else nn.Parameter(torch.ones(1))
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.out = nn.Linear(n_embd, n_embd, bias=bias)
        self.dropout = Dropout(dropout)
        self.rope = rope

    def matrices(self) -> list[Tensor]:
        """The weight matrices; the last one writes to the residual stream."""
        return [self.qkv.weight, self.out.weight]

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = split_qkv_heads(self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head), self.rope)
        if self.qk_norm_eps is not None and self.qk_gain is not None:
            q, k = (unit_rms(x, self.qk_gain, self.qk_norm_eps) for x in (q, k))
        if cache is not None:
            cache.length = 0  # this pass reads from the first position on
            cache.extend(torch.stack([k, v]).flatten(1, 2))  # (2, B * H, T, D)
        y = attend(q, k, v, self.dropout)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))
