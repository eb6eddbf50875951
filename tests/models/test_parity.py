"""Parity with Hugging Face's models, built from configurations: with their weights, ours compute the same logits."""

from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, build, redraw, some_ids
from torch import Tensor, nn

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0}
LLAMA = SIZES | {
    "num_key_value_heads": 4, "intermediate_size": 64, "max_position_embeddings": 16, "eos_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rms_norm_eps": 1e-3, "tie_word_embeddings": True,
}  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**SIZES, n_positions=16, eos_token_id=0, tie_word_embeddings=False)
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2))


def qwen2_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **LLAMA, num_experts=4, num_experts_per_tok=1, norm_topk_prob=False, qkv_bias=False,
        moe_intermediate_size=64, shared_expert_intermediate_size=8,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config)


def of_gpt2(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's weights under our names; its products store their weights (in, out)."""
    ours = {
        "token_embedding.weight": theirs["transformer.wte.weight"],
        "position_embedding.weight": theirs["transformer.wpe.weight"],
        "norm.weight": theirs["transformer.ln_f.weight"],
        "norm.bias": theirs["transformer.ln_f.bias"],
        "head.weight": theirs["lm_head.weight"],
    }
    names = {
        "ln_1": "norm_1", "ln_2": "norm_2", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out",
        "mlp.c_fc": "feed_forward.up", "mlp.c_proj": "feed_forward.down",
    }  # fmt: skip
    for layer in range(2):
        for name, our_name in names.items():
            for kind in ("weight", "bias"):
                ours[f"blocks.{layer}.{our_name}.{kind}"] = theirs[f"transformer.h.{layer}.{name}.{kind}"].t()
    return ours


def of_llama(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of Llama, Mixtral and Qwen2-MoE under our names."""
    ours = {
        "token_embedding.weight": theirs["model.embed_tokens.weight"],
        "head.weight": theirs["lm_head.weight"],
        "norm.weight": theirs["model.norm.weight"],
    }
    for layer in range(2):
        part = {name.split(".", 3)[3]: w for name, w in theirs.items() if name.startswith(f"model.layers.{layer}.")}
        new = {
            "norm_1.weight": part["input_layernorm.weight"],
            "norm_2.weight": part["post_attention_layernorm.weight"],
            "attention.qkv.weight": torch.cat([part[f"self_attn.{x}_proj.weight"] for x in "qkv"]),
            "attention.out.weight": part["self_attn.o_proj.weight"],
        }
        if "mlp.gate.weight" in part:
            new["feed_forward.router.weight"] = part["mlp.gate.weight"]
            new["feed_forward.gate_up"] = part["mlp.experts.gate_up_proj"]
            new["feed_forward.down"] = part["mlp.experts.down_proj"]
        else:
            new["feed_forward.gate_up.weight"] = torch.cat([part[f"mlp.{x}_proj.weight"] for x in ("gate", "up")])
            new["feed_forward.down.weight"] = part["mlp.down_proj.weight"]
        ours |= {f"blocks.{layer}.{name}": weight for name, weight in new.items()}
    return ours


@pytest.mark.parametrize(
    ("their_model", "kind", "gate"),
    [
        (gpt2, "classic", {}),
        (llama, "dense", {}),
        (mixtral, "mixtral", {"moe_gate": "softmax_selected"}),
        (qwen2_moe, "switch", {"moe_gate": "softmax_all"}),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_hugging_face(their_model: Any, kind: str, gate: dict[str, str]) -> None:
    theirs = their_model().eval()
    redraw(theirs)
    for name, parameter in theirs.named_parameters():
        if "shared_expert." in name:  # Qwen2-MoE's; we have none
            parameter.zero_()
    ours = build(kind, **({} if kind == "classic" else {"rms_norm_eps": 1e-3}), **gate)
    ours.load_state_dict((of_gpt2 if kind == "classic" else of_llama)(theirs.state_dict()))
    ids = some_ids(3, 16)
    expected = theirs(ids).logits
    assert expected.std() > 0.5, "logits this small would agree by themselves"
    torch.testing.assert_close(ours(ids)[0], expected, atol=1e-4, rtol=0)
