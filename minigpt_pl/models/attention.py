"""Causal self-attention: positions, heads, dropout on the probabilities, the cache of keys and values.

Pure torch. The rest of a block is in `layers`.

Shapes: B batch, T positions, C = n_embd, H heads, D = C // H.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt_pl.models.dropout import Dropout, dropout_mask, use_cpu_ops


class RotaryEmbedding(nn.Module):
    """The angles of rotary positions (Su et al., arXiv 2104.09864), in the half-split layout of GPT-NeoX and Llama.

    Args:
        head_width: Width D of a head, even.
        block_size: Most positions that will be asked for.
        theta: Base of the wavelengths.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, block_size: int, theta: float):
        super().__init__()
        if head_width % 2:
            raise ValueError(f"the head width n_embd / n_head is {head_width}: rotary positions need an even one")
        self.theta = theta
        rates = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
        angles = torch.arange(block_size, dtype=torch.float32)[:, None] * rates  # (T, D / 2)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], -1), persistent=False)  # (T, D)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], -1), persistent=False)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The heads x (..., D) turned by the angles of these cosines and sines, as Rope keeps them."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).type_as(x)


class KVCache:
    """Keys and values of one layer, of the positions read so far; room for `size` positions."""

    def __init__(self, size: int):
        self.size = size
        self.length = 0
        self.conv_state: dict[nn.Module, Tensor] = {}
        """What each short convolution has read last."""
        self.kv: Tensor | None = None

    def extend(self, pairs: Tensor) -> tuple[Tensor, ...]:
        """Appends keys and values (2, B * H, T, D) of new positions; returns those of all, (B * H, length, D) each."""
        if self.kv is None:
            self.kv = pairs.new_empty(*pairs.shape[:2], self.size, pairs.shape[3])
        self.kv.narrow(2, self.length, pairs.size(2)).copy_(pairs)
        self.length += pairs.size(2)
        return self.kv.narrow(2, 0, self.length).unbind()


class FusedRotaryQKV(torch.autograd.Function):
    """Rotated queries and keys, and values, (B, H, T, D) each, of their one product (B, T, 3, H, D), in few passes."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        B, T, _, H, D = qkv.shape
        heads = qkv.new_empty(3, B, H, T, D)
        apply_rotary_into(heads[:2], qkv.permute(2, 0, 3, 1, 4)[:2], cos, sin)
        heads[2] = qkv[:, :, 2].transpose(1, 2)
        return heads.unbind()

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        B, H, T, D = dq.shape
        dqkv = dq.new_empty(B, T, 3, H, D)
        target = dqkv.permute(2, 0, 3, 1, 4)
        apply_rotary_into(target[0], dq, cos, -sin)
        apply_rotary_into(target[1], dk, cos, -sin)
        target[2] = dv
        return dqkv, None, None


def split_qkv_heads(qkv: Tensor, rope: RotaryEmbedding | None) -> tuple[Tensor, ...]:
    """Queries, keys and values (B, H, T, D) of their one product (B, T, 3, H, D), the first two rotated."""
    heads = qkv.permute(2, 0, 3, 1, 4)
    if rope is None:
        return heads.unbind()
    cos, sin = rope.cos[: qkv.size(1)], rope.sin[: qkv.size(1)]
    if use_cpu_ops(qkv):
        return FusedRotaryQKV.apply(qkv, cos, sin)
    return *apply_rotary(heads[:2], cos, sin).unbind(), heads[2]


def apply_rotary_into(target: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Writes `rotate` of the heads x (..., T, D) to target; cos and sin (T, D)."""
    half = x.size(-1) // 2
    torch.mul(x, cos, out=target)
    target[..., :half].addcmul_(x[..., half:], sin[..., :half])
    target[..., half:].addcmul_(x[..., :half], sin[..., half:])


class CPUDropoutAttention(torch.autograd.Function):
    """Causal attention with dropout on its probabilities, block of queries by block, for `is_plain_cpu`.

    A block reads only the keys up to its last query, and its matrices are small enough for the allocator to reuse.
    The gradient takes each row's sum of dP * P as dO * O, as FlashAttention does (Dao et al., arXiv 2205.14135).
    """

    block = 64

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:  # all (N, T, D), N = B * H
        T, block = q.size(1), CPUDropoutAttention.block
        future, scale = torch.full((T, T), -math.inf).triu_(1), q.size(-1) ** -0.5
        y, kept = torch.empty_like(q), []
        for start in range(0, T, block):
            stop = min(start + block, T)
            scores = torch.baddbmm(future[start:stop, :stop], q[:, start:stop], k[:, :stop].mT, alpha=scale)
            weights = scores.softmax(-1)
            dropped = dropout_mask(weights, p).mul_(weights)
            y[:, start:stop] = dropped @ v[:, :stop]  # torch multiplies into a part of a tensor on one thread
            kept += [weights, dropped]
        ctx.save_for_backward(q, k, v, y, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, *kept = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        row_sums, scale = (dy * y).sum(-1, keepdim=True), q.size(-1) ** -0.5
        T, block = q.size(1), CPUDropoutAttention.block
        for start, weights, dropped in zip(range(0, T, block), kept[::2], kept[1::2], strict=True):
            stop = min(start + block, T)
            dv[:, :stop] += dropped.mT @ dy[:, start:stop]
            scores = (dy[:, start:stop] @ v[:, :stop].mT).mul_(dropped)
            scores.addcmul_(weights, row_sums[:, start:stop], value=-1)
            dq[:, start:stop] = scores @ k[:, :stop]
            dk[:, :stop] += scores.mT @ q[:, start:stop]
        return dq.mul_(scale), dk.mul_(scale), dv, None


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: Dropout) -> Tensor:
    """Causal scaled dot-product attention; q, k, v (B, H, T, D) -> (B, H, T, D)."""
    if dropout.is_active and use_cpu_ops(q):
        return CPUDropoutAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), dropout.p).view_as(q)
    p = dropout.p if dropout.is_active else 0.0
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017) with one product for queries, keys and values.

    Args:
        n_embd: Width C.
        n_head: Heads H; must divide n_embd.
        dropout: On the attention probabilities.
        bias: Whether the two products add a bias.
        rope: Rotary positions, or None.
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float, bias: bool, rope: RotaryEmbedding | None = None):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd is {n_embd} and n_head {n_head}: n_head must divide n_embd")
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.out = nn.Linear(n_embd, n_embd, bias=bias)
        self.dropout = Dropout(dropout)
        self.rope = rope

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = split_qkv_heads(self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head), self.rope)
        if cache is not None:
            cache.length = 0  # the modules read from the beginning
            cache.extend(torch.stack([k, v]).flatten(1, 2))
        y = attend(q, k, v, self.dropout)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))
