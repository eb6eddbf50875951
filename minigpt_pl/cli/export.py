"""Export of a checkpoint as a Hugging Face model folder, which `transformers` loads without any code of this project.

Weights are renamed, split and transposed, never changed: a model that no layout can express is refused. The package
transformers itself is not needed.
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
from minigpt_pl.cli.classes import named_class
from minigpt_pl.cli.errors import name_as_typed
from minigpt_pl.cli.options import user_options
from minigpt_pl.cli.start import find_start
from minigpt_pl.data.tokenizer import BPETokenizer, Tokenizer, load_tokenizer
from minigpt_pl.models.gpt import GPT, ClassicGPT, ModernGPT
from minigpt_pl.models.moe import MoE
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.lit_modules import from_checkpoint

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

Layout = tuple[dict[str, Any], dict[str, Tensor]]


def layout_of(model: GPT) -> Layout:
    """The config.json and the named weights with which transformers computes the same function.

    Raises:
        UserError: If no layout has the model's function.
    """
    if obstacle := export_obstacle(model):
        raise obstacle
    if isinstance(model, ClassicGPT):
        return gpt2(model)
    assert isinstance(model, ModernGPT)
    return llama_family(model)


def export_obstacle(model: GPT) -> UserError | None:
    """Why no layout has the model's function, and which model has one; None if one has."""
    if type(model) not in (ClassicGPT, ModernGPT):
        problem = f"transformers has no layout for {type(model).__name__}"
        return UserError(problem, remedy="train a ClassicLM or a ModernLM")
    if isinstance(model, ModernGPT) and model.blocks[0].conv_1 is not None:
        problem = "transformers has no layout with short convolutions"
        return UserError(problem, remedy="train with --model.conv_kernel_size 0")
    return None


def export_note(model: GPT) -> str:
    """What `fit` says about a model that cannot be exported; "" for others."""
    obstacle = export_obstacle(model)
    return f"to export a model, {obstacle.remedy}: {obstacle.problem}" if obstacle else ""


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


def library_tokenizer(tokenizer: Tokenizer) -> LibraryTokenizer:
    """The tokenizer for tokenizer.json; a character tokenizer is a BPE without merges."""
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

A {family} model with {params:,} parameters, trained from scratch on one text file with minigpt_pl for {step} steps.

- tokenizer: {kind}, {vocab} tokens in the vocabulary; context: {block} tokens
- text: sha256 `{text}`
- validation loss on the validation split of this text: {loss}
"""


def export(checkpoint_path: Path, out: Path) -> list[Path]:
    """Writes the folder; returns its files.

    Raises:
        UserError: If the checkpoint cannot be read or exported, or the folder is not empty or cannot be written.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("export needs the package safetensors", remedy="pip install safetensors") from None
    checkpoint = read_checkpoint(checkpoint_path)
    model = from_checkpoint(checkpoint).net
    tokenizer = load_tokenizer(checkpoint["TextDataModule"]["tokenizer"])
    config, weights = layout_of(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("it exists already", option="--out", value=out, remedy="name an empty or a new folder")
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    jsons: dict[str, dict[str, Any]] = {
        "config.json": config | {"dtype": "float32", "use_cache": True},
        "generation_config.json": {"do_sample": False, **NO_SPECIAL_TOKENS},
        "tokenizer_config.json": tokenizer_config | {"model_max_length": model.block_size},
    }
    best = checkpoint["callbacks"].get("BestCheckpoint", {})
    # The loss of weights from another step is not known.
    loss = best.get("best_val") if best.get("best_step") == checkpoint["global_step"] else None
    card = CARD.format(
        name=checkpoint_path.resolve().parent.name, params=model.params_total(), family=config["architectures"][0],
        step=checkpoint["global_step"], kind=tokenizer.kind, vocab=len(tokenizer.vocabulary), block=model.block_size,
        text=checkpoint["TextDataModule"]["text_sha256"],
        loss="not known" if loss is None else f"{loss:.4f} nats/token",
    )  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        tensors = {name: weight.clone().contiguous() for name, weight in weights.items()}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        for name, content in jsons.items():
            (out / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        library_tokenizer(tokenizer).save(str(out / "tokenizer.json"))
        (out / "README.md").write_text(card, "utf-8")
    except (OSError, SafetensorError) as error:
        problem = f"it cannot be written ({getattr(error, 'strerror', None) or error})"
        raise UserError(problem, option="--out", value=out, remedy="name another folder") from None
    return sorted(out.iterdir())


def run(command: str, args: list[str]) -> int:
    """Exports a checkpoint and lists the files."""
    about = "Writes a checkpoint as a Hugging Face model folder."
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description=about)
    parser.add_argument("--run_dir", type=str, default="", help="Directory of --ckpt_path last and best.")
    parser.add_argument("--ckpt_path", type=str, default="", help="A file, or best or last in --run_dir; default best.")
    parser.add_argument("--model", type=str, default="", help="Your own class, if the checkpoint holds one.")
    parser.add_argument("--out", type=str, required=True, help="The folder to write, new or empty.")
    options = parser.parse_args(args)
    if options.model:
        named_class("model", options.model)  # imports it
    try:
        start = find_start(options.ckpt_path or options.run_dir and "best", options.run_dir, command)
        assert start is not None, "only fit may start from nothing"
        files = export(start, Path(options.out))
    except UserError as error:
        raise name_as_typed(error, user_options(args, command)) from error
    for path in files:
        print(path)
    return 0
