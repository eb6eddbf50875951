"""The reference report's modern model, written as fast as plain torch allows: F.dropout, no cache of keys and values.

Every expert computes every token. It is only measured against; the project's own models are in the package.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, dropout: float, block_size: int):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.q, self.k, self.v, self.o = (nn.Linear(n_embd, n_embd, bias=False) for _ in range(4))
        width = n_embd // n_head
        angles = torch.outer(torch.arange(block_size), 10000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x: Tensor) -> Tensor:  # interleaved pairs
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = self.cos[: x.size(-2)], self.sin[: x.size(-2)]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        heads = [p(x).view(*x.shape[:2], self.n_head, -1).transpose(1, 2) for p in (self.q, self.k, self.v)]
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            self.rotate(heads[0]), self.rotate(heads[1]), heads[2], is_causal=True, dropout_p=p
        )
        return F.dropout(self.o(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, n_embd: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(n_embd, hidden, bias=False), nn.Linear(n_embd, hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class AllExperts(nn.Module):
    def __init__(self, n_embd: int, hidden: int, n_experts: int):
        super().__init__()
        self.router = nn.Linear(n_embd, n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(n_embd, hidden) for _ in range(n_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs = self.router(x).softmax(-1)
        chosen = F.one_hot(probs.argmax(-1), probs.size(-1)).type_as(x)
        y = sum(chosen[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))
        return y, len(self.experts) * (chosen.mean((0, 1)) * probs.mean((0, 1))).sum()


class ReferenceModel(nn.Module):
    """A model with the sizes of modern_moe_char_02; n_experts 0 gives its dense twin."""

    def __init__(
        self, vocab: int, block_size: int, n_layer: int, n_head: int, n_embd: int, dropout: float, n_experts: int
    ):
        super().__init__()
        self.block_size, self.dropout = block_size, dropout
        self.embedding = nn.Embedding(vocab, n_embd)
        feed = lambda: AllExperts(n_embd, 2 * n_embd, n_experts) if n_experts else FeedForward(n_embd, 2 * n_embd)  # noqa: E731
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [nn.RMSNorm(n_embd), Attention(n_embd, n_head, dropout, block_size), nn.RMSNorm(n_embd), feed()]
            )
            for _ in range(n_layer)
        )
        self.norm = nn.RMSNorm(n_embd)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = F.dropout(self.embedding(ids), self.dropout, self.training)
        aux = x.new_zeros(())
        for norm_1, attention, norm_2, feed in self.layers:
            x = x + attention(norm_1(x))
            y = feed(norm_2(x))
            y, layer_aux = y if isinstance(y, tuple) else (y, aux.new_zeros(()))
            x, aux = x + F.dropout(y, self.dropout, self.training), aux + layer_aux
        return F.linear(self.norm(x), self.embedding.weight), aux

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int) -> Tensor:
        """Computes the whole window again for every token."""
        for _ in range(count):
            logits, _ = self(ids[:, -self.block_size :])
            ids = torch.cat([ids, torch.multinomial((logits[:, -1] / 0.8).softmax(-1), 1)], 1)
        return ids
