"""Layouts of transformers itself, as far as they can express a model: a config.json and renamed weights.

Weights are renamed, split and transposed, never changed: those that are returned share their memory with the model's,
so that `import_folder` can write into them. Models that no such layout can express have `own_layout`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minigpt_pl.models.gpt import GPT, ClassicGPT, ModernGPT
from minigpt_pl.models.moe import MoE
from minigpt_pl.runtime.errors import UserError

# Our name -> the layout's name, for each part of a parameter's dotted name.
GPT2_NAMES = {
    "token_embedding": "transformer.wte", "position_embedding": "transformer.wpe", "blocks": "transformer.h",
    "norm_1": "ln_1", "attention": "attn", "qkv": "c_attn", "out": "c_proj",
    "norm_2": "ln_2", "feed_forward": "mlp", "up": "c_fc", "down": "c_proj",
    "norm": "transformer.ln_f", "head": "lm_head",
}  # fmt: skip
LLAMA_NAMES = {
    "token_embedding": "model.embed_tokens", "blocks": "model.layers",
    "norm_1": "input_layernorm", "attention": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj",
    "norm_2": "post_attention_layernorm", "feed_forward": "mlp", "gate": "gate_proj", "up": "up_proj",
    "down": "down_proj", "norm": "model.norm", "head": "lm_head",
}  # fmt: skip
QWEN2_MOE_NAMES = LLAMA_NAMES | {"router": "gate"}
MIXTRAL_NAMES = QWEN2_MOE_NAMES | {"feed_forward": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"}
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None}

REMEDY = "leave out --native true: the folder then brings its own code"

Layout = tuple[dict[str, Any], dict[str, Tensor]]


def native_layout(model: GPT) -> Layout:
    """The config.json and the named weights with which transformers computes the same function.

    Raises:
        UserError: If no layout has the model's function.
    """
    if obstacle := native_obstacle(model):
        raise obstacle
    if isinstance(model, ClassicGPT):
        return gpt2(model)
    assert isinstance(model, ModernGPT)
    return llama_family(model)


def native_obstacle(model: GPT) -> UserError | None:
    """Why no layout has the model's function; None if one has."""
    if type(model) not in (ClassicGPT, ModernGPT):
        return UserError(f"transformers has no layout for {type(model).__name__}", remedy=REMEDY)
    block: Any = model.blocks[-1]
    if block.conv_1 is not None:
        return UserError("transformers has no layout with short convolutions", remedy=REMEDY)
    if len(model.attention_layers()) < len(model.blocks):
        return UserError("transformers has no layout with blocks without attention", remedy=REMEDY)
    if block.attention.qk_norm_eps is not None:
        return UserError("transformers has no layout with the factor that model.qk_norm learns", remedy=REMEDY)
    return None


def rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {".".join(names.get(part, part) for part in name.split(".")): weight for name, weight in weights.items()}


def gpt2(model: ClassicGPT) -> Layout:
    block: Any = model.blocks[0]
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": model.head.out_features,
        "n_positions": model.block_size, "n_embd": model.head.in_features, "n_layer": len(model.blocks),
        "n_head": block.attention.n_head, "n_inner": block.feed_forward.up.out_features,
        "activation_function": {"tanh": "gelu_new", "exact": "gelu"}[block.feed_forward.gelu],
        "layer_norm_epsilon": block.norm_1.eps, "tie_word_embeddings": False, **NO_SPECIAL_TOKENS,
    }  # fmt: skip
    weights = {  # GPT-2 stores the matrices of its blocks as (in, out)
        name: weight.T if name.startswith("blocks.") and weight.dim() == 2 else weight
        for name, weight in model.state_dict().items()
    }
    return config, rename(weights, GPT2_NAMES)


def llama_family(model: ModernGPT) -> Layout:
    """Llama, or with experts Mixtral or Qwen2-MoE: these differ in the feed-forward nets only."""
    block: Any = model.blocks[0]
    n_embd, attention, feed_forward = model.head.in_features, block.attention, block.feed_forward
    is_tied = model.head.weight is model.token_embedding.weight
    config = {
        "vocab_size": model.head.out_features, "hidden_size": n_embd, "num_hidden_layers": len(model.blocks),
        "num_attention_heads": attention.n_head, "num_key_value_heads": attention.n_head,
        "head_dim": n_embd // attention.n_head, "max_position_embeddings": model.block_size,
        "hidden_act": "silu", "rms_norm_eps": block.norm_1.eps, "rope_theta": attention.rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope.theta},
        "tie_word_embeddings": is_tied, "pad_token_id": None, **NO_SPECIAL_TOKENS,
    }  # fmt: skip
    weights = dict(split_fused(model.state_dict()))
    if is_tied:
        del weights["head.weight"]
    if not isinstance(feed_forward, MoE):
        kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        own = {"intermediate_size": feed_forward.down.in_features, "attention_bias": False, "mlp_bias": False}
        return config | kind | own, rename(weights, LLAMA_NAMES)

    hidden, n_experts = feed_forward.down.size(2), feed_forward.n_experts
    config |= {"intermediate_size": hidden, "num_experts_per_tok": feed_forward.top_k}
    if feed_forward.gate == "softmax_selected":
        kind = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        return config | kind | {"num_local_experts": n_experts, "sliding_window": None}, rename(weights, MIXTRAL_NAMES)

    kind = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}
    own = {
        "num_experts": n_experts, "moe_intermediate_size": hidden, "shared_expert_intermediate_size": 1,
        "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
    }  # fmt: skip
    ones = {"gate": (1, n_embd), "up": (1, n_embd), "down": (n_embd, 1)}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.bias": (n_embd,) for name in "qkv"}
    shapes |= {f"mlp.shared_expert.{name}_proj.weight": shape for name, shape in ones.items()}
    shapes["mlp.shared_expert_gate.weight"] = (1, n_embd)
    layers = range(len(model.blocks))  # the layout requires these parameters; with zeros they add nothing
    zeros = {f"model.layers.{i}.{name}": torch.zeros(shape) for i in layers for name, shape in shapes.items()}
    return config | kind | own, rename(weights, QWEN2_MOE_NAMES) | zeros


def split_fused(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Named weights with fused matrices split, and with stacked experts (E, o, i) one by one."""
    for name, weight in weights.items():
        prefix, _, last = name.removesuffix(".weight").rpartition(".")
        parts = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(last, (last,))
        for e, matrix in enumerate(weight if weight.dim() == 3 else [weight]):
            path = f"{prefix}.experts.{e}" if weight.dim() == 3 else prefix
            for part, chunk in zip(parts, matrix.chunk(len(parts)), strict=True):
                yield f"{path}.{part}.weight".removeprefix("."), chunk
