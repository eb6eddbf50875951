"""What the page needs of a checkpoint: how its model is built, its weights in float16, its tokenizer.

The forward pass that reads them is `assets/model.js`.
"""

import json
from typing import Any

import numpy as np
import torch

from minigpt_pl.data.tokenizer import BPETokenizer, Tokenizer
from minigpt_pl.generation.incremental import supports
from minigpt_pl.models.blocks import MLP, SwiGLU
from minigpt_pl.models.gpt import GPT
from minigpt_pl.models.moe import MoE
from minigpt_pl.runtime.errors import UserError

FLOAT16_MAX = torch.finfo(torch.float16).max


def model_spec(net: GPT) -> dict[str, Any]:
    """How a model is put together, in plain values.

    Raises:
        UserError: If it has parts that the page does not know.
    """
    if not supports(net):
        raise UserError("the page knows only the models of this package", remedy="train a ClassicLM or a ModernLM")
    blocks: list[Any] = list(net.blocks)
    attention = blocks[-1].attention  # the last block has one
    return {
        "vocab_size": net.head.out_features,
        "block_size": net.block_size,
        "n_embd": net.head.in_features,
        "n_head": attention.n_head,
        "qk_norm_eps": attention.qk_norm_eps,
        "rope_theta": attention.rope.theta if attention.rope else None,
        "tied": net.head.weight is net.token_embedding.weight,
        "norm": norm_spec(net.norm),
        "blocks": [
            {
                "norm_1": norm_spec(block.norm_1) if block.attention is not None else None,
                "norm_2": norm_spec(block.norm_2),
                "conv_1": block.conv_1 is not None, "conv_2": block.conv_2 is not None,
                "feed_forward": feed_forward_spec(block.feed_forward),
            }
            for block in blocks
        ],
    }  # fmt: skip


def norm_spec(norm: Any) -> dict[str, Any]:
    return {"kind": "layer" if isinstance(norm, torch.nn.LayerNorm) else "rms", "eps": norm.eps}


def feed_forward_spec(part: Any) -> dict[str, Any]:
    if isinstance(part, MoE):
        sizes = {"n_experts": part.n_experts, "top_k": part.top_k, "gate": part.gate}
        return {"kind": "moe", "hidden": part.down.size(2), **sizes}
    if isinstance(part, MLP):
        return {"kind": "mlp", "hidden": part.up.out_features, "gelu": part.gelu}
    assert isinstance(part, SwiGLU)
    return {"kind": "swiglu", "hidden": part.down.in_features}


def packed_weights(net: GPT) -> tuple[list[tuple[str, list[int]]], bytes]:
    """The names and shapes of the parameters, tied ones once, and their float16 values one after the other.

    Raises:
        UserError: If a weight is too large for float16.
    """
    parameters = list(net.named_parameters())
    for name, parameter in parameters:
        if not parameter.abs().max() <= FLOAT16_MAX:
            raise UserError(f"{name} has a weight above {FLOAT16_MAX:.0f}, which float16 cannot hold")
    halves = [parameter.detach().cpu().half().numpy().ravel() for _, parameter in parameters]
    shapes = [(name, list(parameter.shape)) for name, parameter in parameters]
    return shapes, np.concatenate(halves).astype("<f2").tobytes()


def tokenizer_spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """Vocabulary, merges, and the longest line within which they happen."""
    spec: dict[str, Any] = {"kind": tokenizer.kind, "vocabulary": tokenizer.vocabulary, "merges": [], "max_line": None}
    if isinstance(tokenizer, BPETokenizer):
        library = json.loads(tokenizer.library.to_str())["model"]
        spec |= {"merges": library["merges"], "max_line": tokenizer.max_line}
    return spec
