"""What is faster by hand on a CPU than in torch; tests/models/test_blocks.py holds each equal to what it replaces.

| here                  | in place of                                    |
|-----------------------|------------------------------------------------|
| `dropout_mask`        | `F.dropout`, which draws its mask on one thread |
| `CPUDropoutAttention` | `scaled_dot_product_attention` with dropout    |
| `FusedRotaryQKV`      | `attention.apply_rotary` and a transpose       |
| `CPURMSNorm`          | `torch.rms_norm`                               |
| `CPUUnitRMS`          | `torch.rms_norm` without a weight              |
| `CPUSwiGLU`           | the gradient of `blocks.swiglu`                |

Shapes: B batch, T positions, C width, H heads, D = C // H, N = B * H.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def use_cpu_ops(x: Tensor) -> bool:
    """Whether these functions apply: x is on the CPU, in a dtype they know, and torch.compile is not tracing."""
    known = x.dtype in (torch.float32, torch.bfloat16)
    return x.device.type == "cpu" and known and not torch.compiler.is_compiling()


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """1 / (1 - p) where an element stays and 0 where it is dropped, for a tensor on the CPU; p is kept to 16 bits.

    torch draws one number for each element on one thread, which costs a third of a training step. Here four elements
    share one 64-bit number of the default generator.
    """
    count = like.numel()
    # The full range is given because random_() without one leaves the top bit of each number 0.
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = torch.empty_like(like)  # written as 0 or 1 directly, without a pass over booleans
    torch.ge(bits.view(torch.int16)[:count].view(like.shape), min(round(p * 2**16), 2**16 - 1) - 2**15, out=kept)
    return kept.mul_(1 / (1 - p))


class CPUDropoutAttention(torch.autograd.Function):
    """Causal attention with dropout on its probabilities, one block of queries at a time; q, k, v (N, T, D).

    torch's own kernel with dropout materialises (N, T, T) several times over. A block of queries reads only the keys up
    to its last query, and its matrices are small enough for the allocator to reuse them. The gradient takes each row's
    sum of dP * P as dO * O, as FlashAttention does (Dao et al., arXiv 2205.14135).
    """

    block = 64

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        T, block = q.size(1), CPUDropoutAttention.block
        future, scale = torch.full((T, T), -math.inf).triu_(1), q.size(-1) ** -0.5
        y, saved = torch.empty_like(q), []
        for start in range(0, T, block):
            stop = min(start + block, T)
            scores = torch.baddbmm(future[start:stop, :stop], q[:, start:stop], k[:, :stop].mT, alpha=scale)
            weights = scores.softmax(-1)  # (N, block, stop)
            dropped = dropout_mask(weights, p).mul_(weights)
            # Assigned, not written with out=: torch multiplies into a part of a tensor on one thread only.
            y[:, start:stop] = dropped @ v[:, :stop]
            saved += [weights, dropped]
        ctx.save_for_backward(q, k, v, y, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, *saved = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        row_sums, scale = (dy * y).sum(-1, keepdim=True), q.size(-1) ** -0.5  # (N, T, 1)
        T, block = q.size(1), CPUDropoutAttention.block
        for start, weights, dropped in zip(range(0, T, block), saved[::2], saved[1::2], strict=True):
            stop = min(start + block, T)
            dv[:, :stop] += dropped.mT @ dy[:, start:stop]
            scores = (dy[:, start:stop] @ v[:, :stop].mT).mul_(dropped)
            scores.addcmul_(weights, row_sums[:, start:stop], value=-1)
            dq[:, start:stop] = scores @ k[:, :stop]
            dk[:, :stop] += scores.mT @ q[:, start:stop]
        return dq.mul_(scale), dk.mul_(scale), dv, None


class FusedRotaryQKV(torch.autograd.Function):
    """Rotated queries and keys, and values, (B, H, T, D) each, from one projection (B, T, 3, H, D).

    The rotation writes into the transposed layout directly, which saves two passes over memory each way.
    """

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
        apply_rotary_into(target[0], dq, cos, -sin)  # the inverse of a rotation is one by the negative angle
        apply_rotary_into(target[1], dk, cos, -sin)
        target[2] = dv
        return dqkv, None, None


def apply_rotary_into(target: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Writes `attention.apply_rotary` of the heads x (..., T, D) to target; cos and sin (T, D)."""
    half = x.size(-1) // 2
    torch.mul(x, cos, out=target)
    target[..., :half].addcmul_(x[..., half:], sin[..., :half])
    target[..., half:].addcmul_(x[..., :half], sin[..., half:])


class CPURMSNorm(torch.autograd.Function):
    """RMSNorm of x (..., C) in about half the passes over memory that torch makes on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)  # (..., 1)
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


class CPUUnitRMS(torch.autograd.Function):
    """x / rms(x) * gain of x (..., D) and gain (1,) in a third of the time that torch takes for short rows on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)  # (..., 1)
        ctx.save_for_backward(x, scale, gain)
        return x * (scale * gain).type_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, gain = ctx.saved_tensors
        mean = (dy * x).mean(-1, keepdim=True) * scale  # (..., 1), of dy * unit
        factor = (scale * gain).type_as(x)
        dx = (dy * factor).addcmul_(x, factor * scale * mean, value=-1)
        return dx, mean.sum().mul_(x.size(-1)).view_as(gain).type_as(gain), None


class CPUSwiGLU(torch.autograd.Function):
    """silu(gate) * up of (..., 2 F), gate first; the gradients of both halves are written into one tensor, uncopied."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, -1)
        torch.mul(dy, activated, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return dgate_up


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean square + eps) over the last dimension of (..., C), as (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(torch.scalar_tensor(eps), norm, norm, value=1 / x.size(-1)).rsqrt_()
