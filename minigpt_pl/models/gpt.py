"""The two GPTs: each a short assembly of the parts in `attention`, `layers` and `moe`, with one rule of initialisation.

Pure torch: no training, no tokens, no Lightning. `forward` gives logits and the aux loss; `modules` adds them up.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt_pl.models.attention import CausalSelfAttention, KVCache, RotaryEmbedding
from minigpt_pl.models.blocks import MLP, Block, RMSNorm, SwiGLU
from minigpt_pl.models.dropout import Dropout
from minigpt_pl.models.moe import MoE, RouterGate
from minigpt_pl.models.short_conv import ShortConv


class GPT(nn.Module):
    """What both decoders share: embed, run the blocks, norm, head. Heirs fill in the parts."""

    block_size: int
    token_embedding: nn.Embedding
    dropout: Dropout
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, T, C) of the tokens at the first T positions."""
        raise NotImplementedError

    def forward(self, ids: Tensor, cache: list[KVCache] | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the next token at each position of ids (B, T), and the aux loss, summed over layers.

        A cache (`new_cache`) is filled from its beginning, for `decoding` to go on with; the logits are then those of
        the last position alone, (B, 1, V).
        """
        assert ids.size(1) <= self.block_size, f"{ids.size(1)} positions, but {self.block_size} at most"
        x = self.dropout(self.embed(ids))
        aux = x.new_zeros(())
        for layer, block in enumerate(self.blocks):
            x, block_aux = block(x, cache[layer] if cache else None)
            if block_aux is not None:
                aux = aux + block_aux
        if cache:
            x = x[:, -1:]
        return self.head(self.norm(x)), aux

    def new_cache(self) -> list[KVCache]:
        """An empty cache for `forward`."""
        return [KVCache(self.block_size) for _ in self.blocks]

    def moe_layers(self) -> Iterator[MoE]:
        return (block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoE))

    def params_total(self) -> int:
        """Every parameter, embeddings included, tied ones once."""
        return sum(p.numel() for p in self.parameters())

    def params_active(self) -> int:
        """Parameters that one token uses: all, less the experts that it does not choose."""
        idle = sum(
            (1 - moe.top_k / moe.n_experts) * (moe.gate_up.numel() + moe.down.numel()) for moe in self.moe_layers()
        )
        return self.params_total() - round(idle)

    def flops_per_token(self) -> int:
        """FLOPs of one token's forward and backward pass in training, as PaLM counts (arXiv 2204.02311, appendix B).

        Six for each active weight that multiplies, and 12 C T a layer for full attention over the window.
        """
        weights = self.params_active() - sum(p.numel() for p in self.parameters() if p.dim() < 2)
        lookups = self.lookup_params()
        return 6 * (weights - lookups) + 12 * len(self.blocks) * self.token_embedding.embedding_dim * self.block_size

    def lookup_params(self) -> int:
        """Weights that are looked up, not multiplied."""
        raise NotImplementedError


def init_weights(model: nn.Module, std: Callable[[str], float], seed: int) -> None:
    """Draws every parameter from one generator of its own: weights and embeddings normal, biases 0, norms 1.

    Args:
        model: Its parameters are overwritten in place.
        std: Standard deviation of the weights by parameter name.
        seed: Of the generator; the global one is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))}
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied one comes once
            if name in norms:
                parameter.fill_(1)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                assert parameter.dim() >= 2, f"no rule to initialise {name}"
                if not parameter.is_meta:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std(name))


def gpt2_std(n_layer: int) -> Callable[[str], float]:
    """GPT-2's standard deviations, by parameter name: smaller where a product feeds the residual stream."""
    to_residual = ("attention.out.weight", "feed_forward.down.weight")
    return lambda name: 0.02 / math.sqrt(2 * n_layer) if name.endswith(to_residual) else 0.02


def check_positive(**sizes: float) -> None:
    """Raises ValueError for the first size that is not positive."""
    for name, value in sizes.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}: it must be positive")


class ClassicGPT(GPT):
    """GPT-2's decoder (Radford et al. 2019): learned positions, LayerNorm, GELU, biases; an untied head.

    Args:
        vocab_size: Tokens V in the vocabulary.
        block_size: Most positions T.
        n_layer: Blocks.
        n_head: Heads in a block; must divide n_embd.
        n_embd: Width C.
        dropout: On embeddings, attention probabilities and both branches of a block.
        seed: Of the initial weights: N(0, 0.02), the products that feed the residual stream scaled by
            1 / sqrt(2 n_layer), as in GPT-2.
    """

    def __init__(
        self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int, dropout: float, seed: int
    ):
        super().__init__()
        check_positive(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = nn.Embedding(block_size, n_embd)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                nn.LayerNorm(n_embd),
                CausalSelfAttention(n_embd, n_head, dropout, bias=True),
                nn.LayerNorm(n_embd),
                MLP(n_embd),
                dropout,
            )
            for _ in range(n_layer)
        )
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        init_weights(self, gpt2_std(n_layer), seed)

    def embed(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.size(1)]

    def lookup_params(self) -> int:
        return self.token_embedding.weight.numel() + self.position_embedding.weight.numel()


class ModernGPT(GPT):
    """Llama's decoder (Touvron et al. 2023): RMSNorm, RoPE, SwiGLU or a mixture of such experts.

    Args:
        vocab_size: Tokens V in the vocabulary.
        block_size: Most positions T.
        n_layer: Blocks.
        n_head: Heads in a block; must divide n_embd.
        n_embd: Width C.
        dropout: On embeddings, attention probabilities and both branches of a block.
        rope_theta: Base of the rotary wavelengths.
        rms_norm_eps: Added to the mean square under the root.
        ffn_mult: Hidden width of a feed-forward net, or of one expert, in units of n_embd.
        n_experts: Experts in each block; 0 for one dense feed-forward net.
        moe_top_k: Experts that a token chooses.
        moe_gate: How the chosen are weighed; see `moe.MoE`.
        seed: Of the initial weights, N(0, 0.02) except where they are 0.
        tie_embeddings: Whether the head is the embedding.
        zero_init: Whether each branch of a block, and the head where it is not tied, begins at 0.
        conv_kernel_size: Positions that the short convolutions before both branches of a block add up, beginning at 0;
            0 for no convolutions.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        n_layer: int,
        n_head: int,
        n_embd: int,
        dropout: float,
        rope_theta: float,
        rms_norm_eps: float,
        ffn_mult: float,
        n_experts: int,
        moe_top_k: int,
        moe_gate: RouterGate,
        seed: int,
        tie_embeddings: bool,
        zero_init: bool,
        conv_kernel_size: int,
    ):
        super().__init__()
        check_positive(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, rope_theta=rope_theta)
        hidden = int(ffn_mult * n_embd)
        check_positive(rms_norm_eps=rms_norm_eps, ffn_mult=ffn_mult)
        if hidden < 1:
            raise ValueError(f"ffn_mult is {ffn_mult}: it must give n_embd, {n_embd}, a hidden width of at least 1")
        if n_experts < 0:
            raise ValueError(f"n_experts is {n_experts}: it must be 0, for a dense model, or more")
        if conv_kernel_size < 0:
            raise ValueError(f"conv_kernel_size is {conv_kernel_size}: it must be 0, for no convolutions, or more")
        if n_embd % n_head or n_embd // n_head % 2:
            raise ValueError(
                f"n_embd is {n_embd} and n_head {n_head}: n_head must divide n_embd into heads of even width, "
                "for rotary positions"
            )
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.dropout = Dropout(dropout)
        rope = RotaryEmbedding(n_embd // n_head, block_size, rope_theta)
        self.blocks = nn.ModuleList(
            Block(
                RMSNorm(n_embd, rms_norm_eps),
                CausalSelfAttention(n_embd, n_head, dropout, bias=False, rope=rope),
                RMSNorm(n_embd, rms_norm_eps),
                MoE(n_embd, hidden, n_experts, moe_top_k, moe_gate) if n_experts else SwiGLU(n_embd, hidden),
                dropout,
                *(ShortConv(n_embd, conv_kernel_size) for _ in range(2 if conv_kernel_size else 0)),
            )
            for _ in range(n_layer)
        )
        self.norm = RMSNorm(n_embd, rms_norm_eps)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.token_embedding.weight
        outputs = ("attention.out.weight", "feed_forward.down.weight", "feed_forward.down", "head.weight")
        zeros = (*(outputs if zero_init else ()), "conv_1.weight", "conv_2.weight")
        init_weights(self, lambda name: 0.0 if name.endswith(zeros) else 0.02, seed)

    def embed(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids)

    def lookup_params(self) -> int:
        tied = self.head.weight is self.token_embedding.weight  # looked up at the bottom and multiplied at the top
        return 0 if tied else self.token_embedding.weight.numel()


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each target (B, T) under logits (B, T, V), in fp32; 0 where it is -100."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
