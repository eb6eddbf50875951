"""Export of a checkpoint as a Hugging Face model folder, which `transformers` loads where this project is missing.

Weights are never changed. Which names they have is decided in `native_layouts` and `own_layout`; the way back is in
`import_folder`. The package transformers itself is not needed.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders
from tokenizers import models as token_models

from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.cli.classes import named_class
from minigpt_pl.cli.errors import name_as_typed
from minigpt_pl.cli.given_options import user_options
from minigpt_pl.cli.native_layouts import NO_SPECIAL_TOKENS, Layout, native_layout, native_obstacle
from minigpt_pl.cli.own_layout import MODELING_FILE, modeling_source, own_layout, own_layout_obstacle
from minigpt_pl.cli.start import find_start
from minigpt_pl.data.config import DataConfig
from minigpt_pl.data.tokenizer import BPETokenizer, Tokenizer, load_tokenizer
from minigpt_pl.models.gpt import GPT
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.lit_modules import from_checkpoint


def export_note(model: GPT) -> str:
    """What `fit` says about a model that cannot be exported; "" for others."""
    obstacle = own_layout_obstacle(model)
    return f"to export a model, {obstacle.remedy}: {obstacle.problem}" if obstacle else ""


def layout_of(model: GPT, native: bool | None) -> Layout:
    """The config.json and the named weights of a folder.

    Args:
        model: The model.
        native: Whether in a layout of transformers itself; None: if one can express the model.

    Raises:
        UserError: If the layout cannot express the model.
    """
    if native or native is None and native_obstacle(model) is None:
        return native_layout(model)
    return own_layout(model)


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
OWN_CODE = f"""
Load it with `trust_remote_code=True`: its code is in `{MODELING_FILE}`.
"""


def origin(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What `minigpt import` needs beside weights and tokenizer: the configuration of model and data, and the hashes.

    Paths stay at home: of the text's only the file's name.
    """
    config, text = checkpoint["config"], checkpoint["TextDataModule"]
    data = {name: value for name, value in config["data"].items() if name in DataConfig.__dataclass_fields__}
    return {
        "model": config["model"],
        "data": data | {"path": Path(text["text_path"]).name},
        "seed_everything": config["seed_everything"],
        "step": checkpoint["global_step"],
        "text_sha256": text["text_sha256"],
        "tokenizer_sha256": text["tokenizer_sha256"],
    }


def export(checkpoint_path: Path, out: Path, native: bool | None = None) -> list[Path]:
    """Writes the folder; returns its files. `native` as in `layout_of`.

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
    config, weights = layout_of(model, native)
    own_code = config["model_type"] == "minigpt"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("it exists already", option="--out", value=out, remedy="name an empty or a new folder")
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    jsons: dict[str, dict[str, Any]] = {
        "config.json": config | {"dtype": "float32", "use_cache": True, "minigpt": origin(checkpoint)},
        "generation_config.json": {"do_sample": False, **NO_SPECIAL_TOKENS},
        "tokenizer_config.json": tokenizer_config | {"model_max_length": model.block_size},
    }
    best = checkpoint.get("callbacks", {}).get("BestCheckpoint", {})
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
        library = library_tokenizer(tokenizer)
        (out / "tokenizer.json").write_text(library.to_str(pretty=True), "utf-8")  # save() takes UTF-8 paths only
        (out / "README.md").write_text(card + OWN_CODE * own_code, "utf-8", "replace")
        if own_code:
            (out / MODELING_FILE).write_text(modeling_source(version("minigpt_pl")), "utf-8")
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
    parser.add_argument(
        "--native", type=bool | None, default=None,
        help="Use a layout of transformers itself (true), or one with its own code (false); default: if one fits.",
    )  # fmt: skip
    parser.add_argument("--out", type=str, required=True, help="The folder to write, new or empty.")
    options = parser.parse_args(args)
    if options.model:
        named_class("model", options.model)  # imports it
    try:
        start = find_start(options.ckpt_path or options.run_dir and "best", options.run_dir, command)
        assert start is not None, "only fit may start from nothing"
        files = export(start, Path(options.out), options.native)
    except UserError as error:
        raise name_as_typed(error, user_options(args, command)) from error
    for path in files:
        print(path)
    return 0
