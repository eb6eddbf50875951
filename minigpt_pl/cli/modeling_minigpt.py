"""A decoder of minigpt_pl as a model of transformers: its sizes, its forward pass, and generation with a cache.

Here it is a template that nothing imports. `own_layout` writes it into exported folders and puts the sources of the
imported parts in place of their imports: there it needs torch and transformers alone.

Shapes: B batch, T new positions, S positions so far, C width, H heads, D = C // H.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Names that are not used below are what the sources of the others use.
from minigpt_pl.models.attention import apply_rotary, rotary_cos_sin
from minigpt_pl.models.blocks import MLP, SwiGLU
from minigpt_pl.models.config import GELU, RouterGate  # noqa: F401
from minigpt_pl.models.moe import (  # noqa: F401
    MoE,
    autocast_tensors,
    grouped_linear,
    supports_grouped_mm,
    topk_route,
)
from minigpt_pl.models.short_conv import causal_depthwise_conv

CACHE_FIELD = next(name for name in ("cache", "past_key_values") if hasattr(CausalLMOutputWithPast, name))
"""As this version of transformers calls it."""


class MiniGPTConfig(PretrainedConfig):
    """Sizes, and which parts the decoder is made of.

    Args:
        vocab_size: Tokens.
        hidden_size: Width C.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads H.
        max_position_embeddings: Positions that the model was trained on.
        intermediate_size: Hidden width of a SwiGLU network or of one expert.
        norm: layer or rms.
        norm_eps: Added under its root.
        linear_bias: Whether linear layers add a bias.
        rotary_theta: Base of the rotary wavelengths; None for learned positions.
        qk_norm_eps: Added to the mean square by which queries and keys are divided; None if they are not.
        attention_layers: The numbers of the blocks with attention, from 0; None for all.
        feed_forward: mlp, swiglu or moe.
        gelu: That of mlp: tanh or exact.
        n_experts: Of moe.
        moe_top_k: Of moe.
        moe_gate: Of moe.
        conv_kernel_size: Positions of the short convolutions; 0 for none.
        use_cache: Whether keys and values are kept from token to token.
    """

    model_type = "minigpt"

    def __init__(
        self,
        vocab_size: int = 2,
        hidden_size: int = 4,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 1,
        max_position_embeddings: int = 2,
        intermediate_size: int = 4,
        norm: str = "rms",
        norm_eps: float = 1e-8,
        linear_bias: bool = False,
        rotary_theta: float | None = None,
        qk_norm_eps: float | None = None,
        attention_layers: list[int] | None = None,
        feed_forward: str = "swiglu",
        gelu: str = "tanh",
        n_experts: int = 0,
        moe_top_k: int = 1,
        moe_gate: str = "softmax_all",
        conv_kernel_size: int = 0,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in given.items():
            setattr(self, name, value)
        if attention_layers is None:
            self.attention_layers = list(range(num_hidden_layers))
        super().__init__(**kwargs)


class Context:
    """What all blocks share in one forward pass.

    Args:
        config: The sizes.
        ids: Token ids of the new positions (B, T).
        attention_mask: 0 where a position is padding, else 1, (B, S); None for no padding.
        cache: Keys, values and inputs of short convolutions of the positions before, or None.
    """

    def __init__(self, config: Any, ids: Tensor, attention_mask: Tensor | None, cache: Any):
        T, past = ids.size(1), cache.get_seq_length() if cache is not None else 0
        self.cache = cache
        if past + T > config.max_position_embeddings:
            raise ValueError(f"{past + T} positions, but the model has {config.max_position_embeddings}")
        self.positions = torch.arange(past, past + T, device=ids.device)[None]  # (1 or B, T)
        self.mask, self.is_causal, self.is_token = None, T > 1 and not past, None
        if T > 1 and past:
            self.mask = torch.ones(T, past + T, dtype=torch.bool, device=ids.device).tril(past)
        if attention_mask is not None and not attention_mask[:, -(past + T) :].all():
            is_token = attention_mask[:, -(past + T) :].bool()  # (B, S)
            self.positions = (is_token.cumsum(-1) - 1).clamp(min=0)[:, past:]
            causal = torch.ones(T, past + T, dtype=torch.bool, device=ids.device).tril(past)
            itself = torch.eye(past + T, dtype=torch.bool, device=ids.device)[past:]  # else padding would be a nan
            self.mask, self.is_causal = (causal & is_token[:, None] | itself)[:, None], False  # (B, 1, T, S)
            self.is_token = is_token[:, past:, None]  # (B, T, 1)
        self.rotary = None
        if config.rotary_theta is not None:
            width = config.hidden_size // config.num_attention_heads
            cos, sin = rotary_cos_sin(self.positions, width, config.rotary_theta)
            self.rotary = cos[:, None], sin[:, None]  # (1 or B, 1, T, D)

    def extend(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values (B, H, S, D) of one entry of the cache, after the new ones (B, H, T, D)."""
        return (keys, values) if self.cache is None else self.cache.update(keys, values, index)


class Attention(nn.Module):
    """Causal self-attention over the cache and the new positions."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.n_head, self.qk_norm_eps = config.num_attention_heads, config.qk_norm_eps
        self.entry = config.attention_layers.index(layer)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.qk_gain = None if self.qk_norm_eps is None else nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if context.rotary is not None:
            q, k = apply_rotary(q, *context.rotary), apply_rotary(k, *context.rotary)
        if self.qk_gain is not None:
            q, k = (F.rms_norm(x, x.shape[-1:], eps=self.qk_norm_eps) * self.qk_gain for x in (q, k))
        k, v = context.extend(self.entry, k, v)
        y = F.scaled_dot_product_attention(q, k, v, context.mask, is_causal=context.is_causal)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class ShortConv(nn.Module):
    """A short causal convolution. The cache has an entry of one head for it, so that it is reordered as all others."""

    def __init__(self, config: Any, entry: int):
        super().__init__()
        self.entry = entry
        self.weight = nn.Parameter(torch.empty(config.conv_kernel_size, config.hidden_size))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        reach, T = len(self.weight) - 1, x.size(1)
        if context.is_token is not None:
            x = x * context.is_token
        seen = context.extend(self.entry, x[:, None], x[:, None, :, :0])[0][:, 0]  # (B, S, C)
        return causal_depthwise_conv(seen[:, -(reach + T) :], self.weight)[:, -T:]


class Block(nn.Module):
    """Pre-norm residual block; where there are short convolutions, they lie between a norm and its branch."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        attends = layer in config.attention_layers
        self.norm_1, self.norm_2 = norm(config) if attends else None, norm(config)
        self.attention = Attention(config, layer) if attends else None
        conv_entry = len(config.attention_layers) + layer + sum(i < layer for i in config.attention_layers)
        has_convs = config.conv_kernel_size > 0
        self.conv_1 = ShortConv(config, conv_entry) if has_convs and attends else None
        self.conv_2 = ShortConv(config, conv_entry + attends) if has_convs else None
        self.feed_forward = feed_forward(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.attention is not None and self.norm_1 is not None:
            y = self.norm_1(x)
            if self.conv_1 is not None:
                y = self.conv_1(y, context)
            x = x + self.attention(y, context)
        y = self.norm_2(x)
        if self.conv_2 is not None:
            y = self.conv_2(y, context)
        y = self.feed_forward(y)
        return x + (y[0] if isinstance(y, tuple) else y)  # with experts also their balance loss, which is not used


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2 F), gate first -> (..., F), for SwiGLU and MoE."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def norm(config: Any) -> nn.Module:
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[config.norm](config.hidden_size, eps=config.norm_eps)


def feed_forward(config: Any) -> nn.Module:
    C, hidden = config.hidden_size, config.intermediate_size
    if config.feed_forward == "mlp":
        return MLP(C, config.gelu)
    if config.feed_forward == "swiglu":
        return SwiGLU(C, hidden)
    return MoE(C, hidden, config.n_experts, config.moe_top_k, config.moe_gate)


class MiniGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder: embed the tokens, run the blocks, normalise, project to logits."""

    config_class = MiniGPTConfig
    _tied_weights_keys = {"head.weight": "token_embedding.weight"}  # where config.tie_word_embeddings is true
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.rotary_theta is None:
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not config.linear_bias:
            for linear in [module for module in self.modules() if isinstance(module, nn.Linear)]:
                linear.register_parameter("bias", None)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Of a model that is not loaded; the rest is as in transformers."""
        super()._init_weights(module)
        if isinstance(module, ShortConv):
            nn.init.zeros_(module.weight)
        elif isinstance(module, MoE):
            nn.init.normal_(module.gate_up, std=0.02)
            nn.init.normal_(module.down, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.token_embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, value: Any) -> None:
        self.head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of the next token at each position of input_ids (B, T), or at the last logits_to_keep."""
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        context = Context(self.config, input_ids, attention_mask, cache)
        x = self.token_embedding(input_ids)  # (B, T, C)
        if self.config.rotary_theta is None:
            x = x + self.position_embedding(context.positions)
        for block in self.blocks:
            x = block(x, context)
        logits = self.head(self.norm(x[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_FIELD: cache})

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # theirs has one entry a layer: `forward` makes one that also has room for the convolutions

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As minigpt_pl generates: beyond the window, its last half is read again, and of a prompt the last window."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache, size = inputs.get("cache", inputs.get("past_key_values")), self.config.max_position_embeddings
        past = cache.get_seq_length() if cache is not None else 0
        if past + inputs["input_ids"].size(1) > size:
            inputs["input_ids"] = input_ids[:, -(max(1, size // 2) if past else size) :]
            inputs[CACHE_FIELD] = DynamicCache() if past else cache
        return inputs
