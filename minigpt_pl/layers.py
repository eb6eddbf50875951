"""The parts that both GPTs are assembled from: dropout, positions, attention, feed-forward nets, one block.

Pure torch. The experts are in `moe`, the assemblies in `models`.

Shapes: B batch, T positions, C = n_embd, H heads, D = C // H, F hidden width of a feed-forward net, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def draws_own_masks(x: Tensor) -> bool:
    """Whether dropout draws its masks here: torch draws them on one thread of a CPU, which costs a third of a step."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def scaled_mask(shape: torch.Size, p: float) -> Tensor:
    """1 / (1 - p) where an element stays and 0 where it goes, fp32 on the CPU; p is kept to 16 bits.

    Four elements share one 64-bit number of the default generator. The full range must be asked for: `random_()` alone
    leaves the top bit of each number unset.
    """
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    stays = torch.empty(shape)  # 0 or 1, without a pass over booleans
    torch.ge(bits.view(torch.int16)[:count].view(shape), round(p * 2**16) - 2**15, out=stays)
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
        return x * scaled_mask(x.shape, self.p) if draws_own_masks(x) else F.dropout(x, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


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
        return FastRMSNorm.apply(x, weight, eps)
    return x * inverse_rms(x, eps) * weight


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean square + eps) over the last dimension of (..., C), as (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(torch.scalar_tensor(eps), norm, norm, value=1 / x.size(-1)).rsqrt_()


class FastRMSNorm(torch.autograd.Function):
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


class Rope(nn.Module):
    """Rotary positions (Su et al., arXiv 2104.09864) in the half-split layout of GPT-NeoX and Llama.

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
        angles = torch.arange(block_size, dtype=torch.float32).view(-1, 1, 1, 1) * rates  # (T, 1, 1, D / 2)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], -1), persistent=False)  # (T, 1, 1, D)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotates the heads x (B, T, n, H, D) of the first T positions."""
        return rotate(x, self.cos[: x.size(1)], self.sin[: x.size(1)])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The heads x (..., D) turned by the angles of these cosines and sines, as Rope keeps them."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).type_as(x)


class LayerCache:
    """Keys and values of one layer, of the positions read so far; room for `size` positions."""

    def __init__(self, size: int):
        self.size = size
        self.length = 0
        self.recent: dict[nn.Module, Tensor] = {}
        """What each short convolution has read last."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values (B, H, T, D) of new positions; returns those of all positions."""
        if self.keys is None or self.values is None:
            shape = (*keys.shape[:2], self.size, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys.narrow(2, self.length, keys.size(2)).copy_(keys)
        self.values.narrow(2, self.length, keys.size(2)).copy_(values)
        self.length += keys.size(2)
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)


class SplitHeads(torch.autograd.Function):
    """Rotated queries and keys, and values, (B, H, T, D) each, of their one product (B, T, 3, H, D), in few passes."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        B, T, _, H, D = qkv.shape
        heads = torch.empty(3, B, H, T, D, dtype=qkv.dtype)
        turn_into(heads[:2], qkv.permute(2, 0, 3, 1, 4)[:2], cos, sin)
        heads[2] = qkv[:, :, 2].transpose(1, 2)
        return heads.unbind()

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        B, H, T, D = dq.shape
        dqkv = torch.empty(B, T, 3, H, D, dtype=dq.dtype)
        target = dqkv.permute(2, 0, 3, 1, 4)
        turn_into(target[0], dq, cos, -sin)
        turn_into(target[1], dk, cos, -sin)
        target[2] = dv
        return dqkv, None, None


def turn_into(target: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = x.size(-1) // 2
    torch.mul(x, cos, out=target)
    target[..., :half].addcmul_(x[..., half:], sin[..., :half])
    target[..., half:].addcmul_(x[..., :half], sin[..., half:])


class DroppedAttention(torch.autograd.Function):
    """Causal attention with dropout on its probabilities, block of queries by block, for `draws_own_masks`.

    A block reads only the keys up to its last query, and its matrices are small enough for the allocator to reuse.
    The gradient takes each row's sum of dP * P as dO * O, as FlashAttention does (Dao et al., arXiv 2205.14135).
    """

    block = 64

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:  # all (N, T, D), N = B * H
        T, block = q.size(1), DroppedAttention.block
        future, scale = torch.full((T, T), -math.inf).triu_(1), q.size(-1) ** -0.5
        y, kept = torch.empty_like(q), []
        for start in range(0, T, block):
            stop = min(start + block, T)
            scores = torch.baddbmm(future[start:stop, :stop], q[:, start:stop], k[:, :stop].mT, alpha=scale)
            weights = scores.softmax(-1)
            dropped = scaled_mask(weights.shape, p).mul_(weights)
            y[:, start:stop].baddbmm_(dropped, v[:, :stop], beta=0)
            kept += [weights, dropped]
        ctx.save_for_backward(q, k, v, y, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, *kept = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        row_sums, scale = (dy * y).sum(-1, keepdim=True), q.size(-1) ** -0.5
        T, block = q.size(1), DroppedAttention.block
        for start, weights, dropped in zip(range(0, T, block), kept[::2], kept[1::2], strict=True):
            stop = min(start + block, T)
            dv[:, :stop].baddbmm_(dropped.mT, dy[:, start:stop])
            scores = (dy[:, start:stop] @ v[:, :stop].mT).mul_(dropped)
            scores.addcmul_(weights, row_sums[:, start:stop], value=-1)
            dq[:, start:stop].baddbmm_(scores, k[:, :stop], beta=0, alpha=scale)
            dk[:, :stop].baddbmm_(scores.mT, q[:, start:stop], alpha=scale)
        return dq, dk, dv, None


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: Dropout) -> Tensor:
    """Causal scaled dot-product attention; q, k, v (B, H, T, D) -> (B, H, T, D)."""
    if dropout.is_active and draws_own_masks(q):
        return DroppedAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), dropout.p).view_as(q)
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

    def __init__(self, n_embd: int, n_head: int, dropout: float, bias: bool, rope: Rope | None = None):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd is {n_embd} and n_head {n_head}: n_head must divide n_embd")
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.out = nn.Linear(n_embd, n_embd, bias=bias)
        self.dropout = Dropout(dropout)
        self.rope = rope

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        if self.rope is None:
            q, k, v = qkv.unbind(2)
        else:
            q, k, v = SplitHeads.apply(qkv, self.rope.cos[:T, 0, 0], self.rope.sin[:T, 0, 0])
            y = attend(q, k, v, self.dropout)  # (B, H, T, D)
            return self.out(y.transpose(1, 2).reshape(B, T, C))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            cache.extend(k, v)
        y = attend(q, k, v, self.dropout)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class GeluMLP(nn.Module):
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

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> tuple[Tensor, Tensor | None]:
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
