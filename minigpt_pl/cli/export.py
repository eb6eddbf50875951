"""A checkpoint as a Hugging Face model folder, which `transformers` loads without any code of ours.

Weights are renamed and cut apart, never changed: what no layout can express is refused. transformers is not needed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders
from tokenizers import models as token_models
from torch import Tensor

from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.data import tokenizer as tokenizers
from minigpt_pl.data.tokenizer import BPETokenizer, Tokenizer
from minigpt_pl.models.attention import CausalSelfAttention
from minigpt_pl.models.gpt import GPT, ClassicGPT, ModernGPT
from minigpt_pl.models.moe import MoE
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.lit_modules import from_checkpoint

Layout = tuple[dict[str, Any], dict[str, Tensor]]


def layout_of(model: GPT) -> Layout:
    """The config.json and the named weights under which transformers computes the same function.

    Raises:
        InputError: If no layout has the model's function.
    """
    if type(model) is ClassicGPT:
        return gpt2(model)
    if type(model) is ModernGPT:
        if blocks_of(model)[0].conv_1 is not None:
            raise UserError("no layout in transformers has short convolutions: train with --model.conv_kernel_size 0")
        first = blocks_of(model)[0].feed_forward
        if not isinstance(first, MoE):
            return llama(model)
        renormalised = first.gate == "softmax_selected"
        return mixtral(model, first) if renormalised else qwen2_moe(model, first)
    raise UserError(f"{type(model).__name__} has no layout in transformers: export a ClassicLM or a ModernLM")


def blocks_of(model: GPT) -> list[Any]:
    """The blocks; torch types the parts of a module as tensors or modules of any kind."""
    return list(model.blocks)


def norm_of(model: GPT) -> Any:
    return model.norm


def gpt2(model: ClassicGPT) -> Layout:
    first = blocks_of(model)[0]
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": model.head.out_features,
        "n_positions": model.block_size,
        "n_embd": model.head.in_features,
        "n_layer": len(blocks_of(model)),
        "n_head": first.attention.n_head,
        "n_inner": first.feed_forward.up.out_features,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": first.norm_1.eps,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    weights = {
        "transformer.wte.weight": model.token_embedding.weight,
        "transformer.wpe.weight": model.position_embedding.weight,
        "transformer.ln_f.weight": norm_of(model).weight,
        "transformer.ln_f.bias": norm_of(model).bias,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(blocks_of(model)):
        for theirs, module in {
            "ln_1": block.norm_1,
            "attn.c_attn": block.attention.qkv,
            "attn.c_proj": block.attention.out,
            "ln_2": block.norm_2,
            "mlp.c_fc": block.feed_forward.up,
            "mlp.c_proj": block.feed_forward.down,
        }.items():
            turned = isinstance(module, torch.nn.Linear)  # GPT-2 keeps its products as (in, out)
            weights[f"transformer.h.{i}.{theirs}.weight"] = module.weight.T if turned else module.weight
            weights[f"transformer.h.{i}.{theirs}.bias"] = module.bias
    return config, weights


def llama_like(model: ModernGPT, family: str, model_type: str) -> Layout:
    """What Llama, Mixtral and Qwen2-MoE share: everything but the feed-forward nets."""
    attention: CausalSelfAttention = blocks_of(model)[0].attention
    n_embd, n_head = model.head.in_features, attention.n_head
    assert attention.rope is not None
    config = {
        "model_type": model_type,
        "architectures": [f"{family}ForCausalLM"],
        "vocab_size": model.head.out_features,
        "hidden_size": n_embd,
        "num_hidden_layers": len(blocks_of(model)),
        "num_attention_heads": n_head,
        "num_key_value_heads": n_head,
        "head_dim": n_embd // n_head,
        "hidden_act": "silu",
        "max_position_embeddings": model.block_size,
        "rms_norm_eps": norm_of(model).eps,
        "rope_theta": attention.rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope.theta},
        "tie_word_embeddings": model.head.weight is model.token_embedding.weight,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    weights = {
        "model.embed_tokens.weight": model.token_embedding.weight,
        "model.norm.weight": norm_of(model).weight,
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = model.head.weight
    for i, block in enumerate(blocks_of(model)):
        at = f"model.layers.{i}"
        weights[f"{at}.input_layernorm.weight"] = block.norm_1.weight
        weights[f"{at}.post_attention_layernorm.weight"] = block.norm_2.weight
        for name, part in zip("qkv", block.attention.qkv.weight.chunk(3), strict=True):
            weights[f"{at}.self_attn.{name}_proj.weight"] = part
        weights[f"{at}.self_attn.o_proj.weight"] = block.attention.out.weight
    return config, weights


def llama(model: ModernGPT) -> Layout:
    config, weights = llama_like(model, "Llama", "llama")
    for i, block in enumerate(blocks_of(model)):
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        for name, weight in {"gate": gate, "up": up, "down": block.feed_forward.down.weight}.items():
            weights[f"model.layers.{i}.mlp.{name}_proj.weight"] = weight
    width = blocks_of(model)[0].feed_forward.down.in_features
    return config | {"intermediate_size": width, "attention_bias": False, "mlp_bias": False}, weights


def experts(moe: MoE) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Number, gate, up and down of each expert."""
    for e, (gate_up, down) in enumerate(zip(moe.gate_up, moe.down, strict=True)):
        yield e, *gate_up.chunk(2), down


def mixtral(model: ModernGPT, first: MoE) -> Layout:
    """The chosen experts' weights are renormalised; with one of them that is the constant 1."""
    config, weights = llama_like(model, "Mixtral", "mixtral")
    for i, block in enumerate(blocks_of(model)):
        at = f"model.layers.{i}.block_sparse_moe"
        weights[f"{at}.gate.weight"] = block.feed_forward.router.weight
        for e, gate, up, down in experts(block.feed_forward):
            weights |= {f"{at}.experts.{e}.w{n}.weight": w for n, w in zip((1, 3, 2), (gate, up, down), strict=True)}
    return config | {
        "intermediate_size": first.down.size(2),
        "num_local_experts": first.n_experts,
        "num_experts_per_tok": first.top_k,
        "sliding_window": None,
    }, weights


def qwen2_moe(model: ModernGPT, first: MoE) -> Layout:
    """Softmax over all experts, not renormalised; the layout's biases and shared expert are there, and zero."""
    config, weights = llama_like(model, "Qwen2Moe", "qwen2_moe")
    n_embd = model.head.in_features
    for i, block in enumerate(blocks_of(model)):
        at = f"model.layers.{i}"
        for name in "qkv":
            weights[f"{at}.self_attn.{name}_proj.bias"] = torch.zeros(n_embd)
        weights[f"{at}.mlp.gate.weight"] = block.feed_forward.router.weight
        for e, gate, up, down in experts(block.feed_forward):
            for name, weight in {"gate": gate, "up": up, "down": down}.items():
                weights[f"{at}.mlp.experts.{e}.{name}_proj.weight"] = weight
        for name, shape in {"gate": (1, n_embd), "up": (1, n_embd), "down": (n_embd, 1)}.items():
            weights[f"{at}.mlp.shared_expert.{name}_proj.weight"] = torch.zeros(shape)
        weights[f"{at}.mlp.shared_expert_gate.weight"] = torch.zeros(1, n_embd)
    return config | {
        "intermediate_size": first.down.size(2),
        "moe_intermediate_size": first.down.size(2),
        "shared_expert_intermediate_size": 1,
        "num_experts": first.n_experts,
        "num_experts_per_tok": first.top_k,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }, weights


def library_tokenizer(tokenizer: Tokenizer) -> LibraryTokenizer:
    """The tokenizer for tokenizer.json; characters are byte pairs that nothing merges."""
    if isinstance(tokenizer, BPETokenizer):
        library = LibraryTokenizer.from_str(tokenizer.library.to_str())
    else:
        vocabulary = {token: i for i, token in enumerate(tokenizer.vocabulary)}
        library = LibraryTokenizer(token_models.BPE(vocab=vocabulary, merges=[]))
    library.decoder = decoders.Fuse()  # without it tokens are joined by spaces
    return library


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A {params:,}-parameter {family} model, trained from scratch on one text file with minigpt_pl for {step} steps.

- tokens: {kind}, {vocab} in the vocabulary; context: {block} tokens
- text: sha256 `{text}`
- validation loss on its own text: {loss}
"""


def export(checkpoint: Path, out: Path) -> list[Path]:
    """Writes the folder; returns its files.

    Raises:
        InputError: If the checkpoint cannot be read or expressed, or the folder holds something already.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("export needs safetensors: pip install safetensors") from None
    saved = read_checkpoint(checkpoint)
    model = from_checkpoint(saved).net
    tokenizer = tokenizers.load_tokenizer(saved["TextDataModule"]["tokenizer"])
    config, weights = layout_of(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already: name an empty or a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        whole = {name: weight.detach().clone().contiguous() for name, weight in weights.items()}
        save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
        texts = {
            "config.json": config | {"dtype": "float32", "use_cache": True},
            "generation_config.json": {"do_sample": False, "bos_token_id": None, "eos_token_id": None},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": model.block_size,
            },
        }
        for name, content in texts.items():
            (out / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        library_tokenizer(tokenizer).save(str(out / "tokenizer.json"))
        best = saved["callbacks"].get("RunSummary", {}).get("best", {})
        loss = best.get("best_val") if best.get("best_step") == saved["global_step"] else None  # else of other weights
        card = CARD.format(
            name=checkpoint.resolve().parent.name, params=model.params_total(), family=config["architectures"][0],
            step=saved["global_step"], kind=tokenizer.kind, vocab=len(tokenizer.vocabulary), block=model.block_size,
            text=saved["TextDataModule"]["text_sha256"], loss="not known" if loss is None else f"{loss:.4f} nats/token",
        )  # fmt: skip
        (out / "README.md").write_text(card, "utf-8")
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out} cannot be written ({why}): choose another") from None
    return sorted(out.iterdir())


def run(command: str, options: list[str]) -> int:
    """Exports a checkpoint and lists the files."""
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description="A Hugging Face model folder.")
    parser.add_argument("--ckpt_path", type=str, required=True, help="The checkpoint's file.")
    parser.add_argument("--out", type=str, required=True, help="The folder to write, new or empty.")
    said = parser.parse_args(options)
    for path in export(Path(said.ckpt_path), Path(said.out)):
        print(path)
    return 0
