"""The parts that both GPTs are assembled from: dropout, positions, attention, feed-forward nets, one block.

Pure torch. The experts are in `moe`, the assemblies in `models`.

Shapes: B batch, T positions, C = n_embd, H heads, D = C // H, F hidden width of a feed-forward net, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014): zeroes with probability p while training, scales the rest up."""

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout is {p}: it must be at least 0 and below 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


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
        rates = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
        angles = torch.arange(block_size, dtype=torch.float32)[:, None] * rates  # (T, D / 2)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], -1), persistent=False)  # (T, D)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], -1), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotates the heads x (B, T, n, H, D) of positions start ... start + T - 1."""
        stop, half = start + x.size(1), x.size(-1) // 2
        cos, sin = self.cos[start:stop, None, None], self.sin[start:stop, None, None]
        return torch.addcmul(x * cos, x.roll(half, -1), sin).type_as(x)


class LayerCache:
    """Keys and values of one layer, of the positions read so far; room for `size` positions."""

    def __init__(self, size: int):
        self.size = size
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values (B, H, T, D) of new positions; returns those of all positions."""
        if self.keys is None or self.values is None:
            shape = (*keys.shape[:2], self.size, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        stop = self.length + keys.size(2)
        self.keys[:, :, self.length : stop] = keys
        self.values[:, :, self.length : stop] = values
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: Dropout) -> Tensor:
    """Causal scaled dot-product attention; q, k, v (B, H, T, D) -> (B, H, T, D).

    With fewer queries than keys (cached generation) the one query is the last position and sees every key.
    """
    assert q.size(2) in (1, k.size(2)), "a cache is either empty or read one position at a time"
    causal = q.size(2) > 1
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, dropout_p=dropout.p if dropout.training else 0.0
    )


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
            q, k = qkv[:, :, 0], qkv[:, :, 1]
        else:
            q, k = self.rope(qkv[:, :, :2], cache.length if cache else 0).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, qkv[:, :, 2]))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(k, v)
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

    A feed-forward net may return (y, aux loss); the block passes the aux loss on, and None for the others.
    """

    def __init__(
        self, norm_1: nn.Module, attention: nn.Module, norm_2: nn.Module, feed_forward: nn.Module, dropout: float
    ):
        super().__init__()
        self.norm_1 = norm_1
        self.attention = attention
        self.norm_2 = norm_2
        self.feed_forward = feed_forward
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> tuple[Tensor, Tensor | None]:
        x = x + self.dropout(self.attention(self.norm_1(x), cache))
        y = self.feed_forward(self.norm_2(x))
        y, aux = y if isinstance(y, tuple) else (y, None)
        return x + self.dropout(y), aux
