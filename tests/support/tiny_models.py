"""Models small enough for a test, one of each kind, and weights with which errors show.

No tests here. Right after initialisation attention is almost uniform and experts are almost equal;
`redraw` changes that.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minigpt_pl.models.config import ClassicConfig, ModernConfig
from minigpt_pl.models.gpt import GPT, ClassicGPT, ModernGPT

EXPERTS: dict[str, dict[str, Any]] = {
    "dense": {"n_experts": 0, "moe_top_k": 1, "moe_gate": "softmax_all"},
    "switch": {"n_experts": 4, "moe_top_k": 1, "moe_gate": "softmax_all"},
    "mixtral": {"n_experts": 4, "moe_top_k": 2, "moe_gate": "softmax_selected"},
}
EXPERTS["recipes"] = {**EXPERTS["dense"], "tie_embeddings": False, "zero_init": True, "conv_kernel_size": 3}
EXPERTS["qk_norm"] = {**EXPERTS["switch"], "qk_norm": True}
EXPERTS["alternating"] = {**EXPERTS["recipes"], "attention_every": 2}
KINDS = ("classic", *EXPERTS)
VOCAB = 19


def build(kind: str, **changes: Any) -> GPT:
    """A model of two layers in eval mode: classic, or the modern one by its experts or other options."""
    sizes = {"vocab_size": VOCAB, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32, "dropout": 0.0}
    seed = changes.pop("seed", 1)
    if kind == "classic":
        return ClassicGPT(ClassicConfig(**{**sizes, **changes}), seed).eval()
    plain = {"tie_embeddings": True, "zero_init": False, "conv_kernel_size": 0, "qk_norm": False, "attention_every": 1}
    modern = {"rope_theta": 100.0, "rms_norm_eps": 1e-5, "ffn_mult": 2.0, **plain, **EXPERTS[kind]}
    return ModernGPT(ModernConfig(**{**sizes, **modern, **changes}), seed).eval()


def redraw(model: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Draws every parameter from N(0, std), those of norms and gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if parameter.dim() == 1 and name.endswith(("weight", "gain")):
                parameter.add_(1)


def lively(kind: str, **changes: Any) -> GPT:
    """As `build`, with weights redrawn."""
    model = build(kind, **changes)
    redraw(model)
    return model


def some_ids(*shape: int, seed: int = 0, vocab_size: int = VOCAB) -> Tensor:
    """Random token ids."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
