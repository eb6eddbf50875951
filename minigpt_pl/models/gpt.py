"""The two decoders, ClassicGPT and ModernGPT, and how their weights are initialised.

Each is a short assembly of parts from `attention`, `blocks`, `moe` and `short_conv`. The sizes are in `config`. The
loss is computed in `training.language_model`.

Shapes: B batch, T positions, V vocabulary, C = n_embd.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt_pl.models.attention import CausalSelfAttention, KVCache, RotaryEmbedding
from minigpt_pl.models.blocks import MLP, Block, RMSNorm, SwiGLU
from minigpt_pl.models.config import ClassicConfig, GPTConfig, ModernConfig
from minigpt_pl.models.dropout import Dropout
from minigpt_pl.models.moe import MoE
from minigpt_pl.models.short_conv import ShortConv


class GPT(nn.Module, ABC):
    """What both decoders share: embed the tokens, run the blocks, normalise, project to logits.

    Args:
        config: The sizes.
    """

    token_embedding: nn.Embedding
    dropout: Dropout
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.block_size = config.block_size

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, T, C) of the tokens (B, T) at the first T positions."""

    def forward(self, ids: Tensor, cache: list[KVCache] | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the next token at each position of ids (B, T), and the balance loss summed over layers.

        With a cache (`new_cache`), the cache is filled from its beginning and only the logits of the last position,
        (B, 1, V), are computed; `generation.incremental` continues from there.
        """
        assert ids.size(1) <= self.block_size, f"{ids.size(1)} positions, but block_size is {self.block_size}"
        x = self.dropout(self.embed(ids))  # (B, T, C)
        aux_loss = x.new_zeros(())
        for layer, block in enumerate(self.blocks):
            x, block_aux_loss = block(x, cache[layer] if cache else None)
            if block_aux_loss is not None:
                aux_loss = aux_loss + block_aux_loss
        if cache:
            x = x[:, -1:]  # generation samples from the last position only
        return self.head(self.norm(x)), aux_loss

    def new_cache(self) -> list[KVCache]:
        """An empty cache for `forward`, one entry a layer."""
        return [KVCache(self.block_size) for _ in self.blocks]

    def attention_layers(self) -> list[int]:
        """The numbers of the blocks with attention, from 0; the last block is one of them."""
        blocks: Any = self.blocks
        return [layer for layer, block in enumerate(blocks) if block.attention is not None]

    def moe_layers(self) -> Iterator[MoE]:
        return (module for module in self.blocks.modules() if isinstance(module, MoE))

    def branch_outputs(self) -> list[Tensor]:
        """The weights that write to the residual stream, one for each branch."""
        return [part.matrices()[-1] for part in self._branches()]

    def matrices(self) -> list[Tensor]:
        """The weights inside the blocks that map vectors to vectors, or a stack of them for experts: Muon's."""
        return [weight for part in self._branches() for weight in part.matrices()]

    def _branches(self) -> Iterator[Any]:
        return (part for part in self.blocks.modules() if hasattr(part, "matrices"))

    def params_total(self) -> int:
        """All parameters, embeddings included; tied ones count once."""
        return sum(p.numel() for p in self.parameters())

    def params_active(self) -> int:
        """Parameters that one token uses: all but those of the experts that it is not sent to."""
        unused = sum(
            (1 - moe.top_k / moe.n_experts) * (moe.gate_up.numel() + moe.down.numel()) for moe in self.moe_layers()
        )
        return self.params_total() - round(unused)

    def flops_per_token(self) -> int:
        """FLOPs of one token's forward and backward pass in training, as PaLM counts (arXiv 2204.02311, appendix B).

        Six for each active weight that multiplies, and 12 C T for each full attention over the window.
        """
        weights = self.params_active() - sum(p.numel() for p in self.parameters() if p.dim() < 2)
        n_embd, attentions = self.token_embedding.embedding_dim, len(self.attention_layers())
        return 6 * (weights - self.lookup_params()) + 12 * attentions * n_embd * self.block_size

    @abstractmethod
    def lookup_params(self) -> int:
        """Weights that are looked up and not multiplied."""


def init_weights(model: nn.Module, seed: int, std: Mapping[Tensor, float], default_std: float = 0.02) -> None:
    """Draws every parameter from one generator: norms and gains are 1, biases 0, other weights N(0, std).

    Args:
        model: Its parameters are overwritten in place.
        seed: Seed of the generator; torch's global generator is not used.
        std: Standard deviation of the weights that differ from the default.
        default_std: Standard deviation of all others.
    """
    generator = torch.Generator().manual_seed(seed)
    norm_weights: set[Tensor] = {m.weight for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))}
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # yields a tied parameter once
            if parameter in norm_weights or name.endswith(".qk_gain"):
                parameter.fill_(1)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                assert parameter.dim() >= 2, f"no rule to initialise {name}"
                if not parameter.is_meta:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * std.get(parameter, default_std))


def residual_std(n_layer: int) -> float:
    """GPT-2's smaller standard deviation for the 2 n_layer weights that write to the residual stream."""
    return 0.02 / math.sqrt(2 * n_layer)


def init_weights_as_torch(model: nn.Module, seed: int) -> None:
    """Draws every parameter as torch's own modules do by default, but from one generator of its own.

    Attention is drawn as nn.MultiheadAttention: Xavier-uniform queries, keys and values, as one matrix (3 C, C), and
    no biases. Other linear layers are Kaiming-uniform (a = sqrt(5)), embeddings N(0, 1), norms 1 and 0.

    Args:
        model: Its parameters are overwritten in place.
        seed: Seed of the generator; torch's global generator is not used.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, math.sqrt(5), generator=generator)
            if module.bias is not None:
                bound = module.in_features**-0.5
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    for module in model.modules():  # after the linear layers, of which an attention has two
        if isinstance(module, CausalSelfAttention):
            nn.init.xavier_uniform_(module.qkv.weight, generator=generator)
            nn.init.zeros_(module.qkv.bias)
            nn.init.zeros_(module.out.bias)


class ClassicGPT(GPT):
    """GPT-2's decoder (Radford et al. 2019): learned positions, LayerNorm, GELU, biases; an untied head.

    Args:
        config: The sizes.
        seed: Seed of the initial weights. gpt2: N(0, 0.02), and `residual_std` where GPT-2 has it.
    """

    def __init__(self, config: ClassicConfig, seed: int):
        super().__init__(config)
        n_embd = config.n_embd
        self.token_embedding = nn.Embedding(config.vocab_size, n_embd)
        self.position_embedding = nn.Embedding(config.block_size, n_embd)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                nn.LayerNorm(n_embd),
                CausalSelfAttention(n_embd, config.n_head, config.dropout, bias=True),
                nn.LayerNorm(n_embd),
                MLP(n_embd, config.gelu),
                config.dropout,
                attention_output_dropout=config.attention_output_dropout,
            )
            for _ in range(config.n_layer)
        )
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, config.vocab_size, bias=False)
        if config.weight_init == "torch":
            init_weights_as_torch(self, seed)
        else:
            init_weights(self, seed, dict.fromkeys(self.branch_outputs(), residual_std(config.n_layer)))

    def embed(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.size(1)]

    def lookup_params(self) -> int:
        return self.token_embedding.weight.numel() + self.position_embedding.weight.numel()


class ModernGPT(GPT):
    """Llama's decoder (Touvron et al. 2023): RMSNorm, RoPE, SwiGLU or a mixture of SwiGLU experts.

    By default it is a hybrid, as LFM2 (Liquid AI 2025) is: most blocks have short convolutions and no attention.

    Args:
        config: The sizes.
        seed: Seed of the initial weights: N(0, 0.02), except those that zero_init sets to 0 and those of the short
            convolutions, which begin at 0.
    """

    def __init__(self, config: ModernConfig, seed: int):
        super().__init__(config)
        n_embd, hidden, eps = config.n_embd, config.ffn_hidden, config.rms_norm_eps
        self.token_embedding = nn.Embedding(config.vocab_size, n_embd)
        self.dropout = Dropout(config.dropout)
        rope = RotaryEmbedding(n_embd // config.n_head, config.block_size, config.rope_theta)
        self.blocks = nn.ModuleList()
        for layer in range(config.n_layer):
            attends = (config.n_layer - 1 - layer) % config.attention_every == 0
            conv_1, conv_2 = (
                ShortConv(n_embd, config.conv_kernel_size) if config.conv_kernel_size and used else None
                for used in (attends, True)
            )
            qk_norm_eps = eps if config.qk_norm else None
            attention = (
                CausalSelfAttention(n_embd, config.n_head, config.dropout, False, rope, qk_norm_eps)
                if attends
                else None
            )
            feed_forward = (
                MoE(n_embd, hidden, config.n_experts, config.moe_top_k, config.moe_gate)
                if config.n_experts
                else SwiGLU(n_embd, hidden)
            )
            norm_1, norm_2 = RMSNorm(n_embd, eps) if attends else None, RMSNorm(n_embd, eps)
            self.blocks.append(Block(norm_1, attention, norm_2, feed_forward, config.dropout, conv_1, conv_2))
        self.norm = RMSNorm(n_embd, eps)
        self.head = nn.Linear(n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        zeros: list[Tensor] = [module.weight for module in self.modules() if isinstance(module, ShortConv)]
        if config.zero_init:
            zeros += self.branch_outputs()
            zeros += [] if config.tie_embeddings else [self.head.weight]
        init_weights(self, seed, dict.fromkeys(zeros, 0.0))

    def embed(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids)

    def lookup_params(self) -> int:
        tied = self.head.weight is self.token_embedding.weight  # then it is multiplied too, at the top
        return 0 if tied else self.token_embedding.weight.numel()


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each target (B, T) under logits (B, T, V), in fp32; 0 where it is -100."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
