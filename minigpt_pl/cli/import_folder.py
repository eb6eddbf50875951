"""`minigpt import`: a folder that `minigpt export` wrote, in whatever layout, as a checkpoint that predicts the same.

transformers may have trained or saved it again in between. The package transformers itself is not needed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from minigpt_pl.checkpoint.io import AtomicCheckpointIO, with_newer_options
from minigpt_pl.cli.classes import named_class
from minigpt_pl.cli.export import layout_of
from minigpt_pl.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, max_line_of
from minigpt_pl.models.gpt import GPT
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.user_classes import find_class
from minigpt_pl.training.lit_modules import MODELS


def import_folder(folder: Path, out: Path) -> None:
    """Writes the checkpoint: weights, sizes, tokenizer and the configuration of the text, but no optimizer state.

    Raises:
        UserError: If the folder is not one of `minigpt export`, or something else was made of its model.
    """

    def error(problem: str, remedy: str = "name a folder that minigpt export wrote") -> UserError:
        return UserError(problem, option="import", value=folder, remedy=remedy)

    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError("import needs the package safetensors", remedy="pip install safetensors") from None
    if out.exists():
        raise UserError("it exists already", option="--out", value=out, remedy="name a new file")
    try:
        config, tokenizer_json = (
            json.loads((folder / name).read_text("utf-8")) for name in ("config.json", "tokenizer.json")
        )
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as cause:
        name = Path(str(getattr(cause, "filename", None) or "a file")).name
        raise error(f"{name} cannot be read ({getattr(cause, 'strerror', None) or cause})") from None
    if "minigpt" not in config:
        raise error("minigpt export did not write it: its config.json has no entry minigpt")
    origin = with_newer_options(config["minigpt"])
    tokenizer = read_tokenizer(tokenizer_json, origin["data"]["tokenizer"])
    if tokenizer.sha256 != origin["tokenizer_sha256"]:
        raise error("its tokenizer.json is not the exported one")
    cls = find_class(MODELS, origin["model"]["class_path"], origin)
    model = cls(**{**origin["model"]["init_args"], "vocab_size": len(tokenizer.vocabulary)})
    if problem := load_weights(model.net, weights, native=config["model_type"] != "minigpt"):
        raise error(problem)
    checkpoint = {
        "state_dict": model.state_dict(),
        "global_step": origin["step"],
        "vocab_size": len(tokenizer.vocabulary),
        "config": {name: origin[name] for name in ("seed_everything", "model", "data")} | {"trainer": {}},
        "TextDataModule": {
            "tokenizer": tokenizer.dump(),
            "tokenizer_sha256": tokenizer.sha256,
            "text_path": origin["data"]["path"],
            "text_sha256": origin["text_sha256"],
        },
    }
    AtomicCheckpointIO().save_checkpoint(checkpoint, out)


def load_weights(model: GPT, weights: dict[str, Tensor], native: bool) -> str:
    """Copies the weights of a folder into the model; returns what does not fit, or ""."""
    targets = layout_of(model, native)[1]
    if different := sorted(targets.keys() ^ weights.keys()):
        return f"its weights are those of another model: {different[0]}"
    for name, target in targets.items():
        if target.shape != weights[name].shape:
            return f"{name} is {list(weights[name].shape)}, not {list(target.shape)}"
        target.copy_(weights[name])  # shares its memory with the model's own
    for name, target in layout_of(model, native)[1].items():
        if not torch.equal(target, weights[name].to(target.dtype)):  # such as biases that the model does not have
            return f"{name} has values that the model has no place for"
    return ""


def read_tokenizer(content: dict[str, Any], kind: str) -> Tokenizer:
    """The tokenizer in a tokenizer.json."""
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    if kind == CharTokenizer.kind:
        return CharTokenizer("".join(vocabulary))
    pattern = (content["pre_tokenizer"] or {}).get("pattern", {}).get("Regex")
    merges = [(a, b) for a, b in content["model"]["merges"]]
    return BPETokenizer(vocabulary, merges, None if pattern is None else max_line_of(pattern))


def run(command: str, args: list[str]) -> int:
    """Imports a folder and prints the checkpoint's name."""
    about = "Writes a folder of minigpt export as a checkpoint, for predict, validate, and fit --init_from."
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description=about)
    parser.add_argument("folder", type=str, help="The folder.")
    parser.add_argument("--model", type=str, default="", help="Your own class, if the folder holds one.")
    parser.add_argument("--out", type=str, required=True, help="The checkpoint to write, a new file.")
    options = parser.parse_args(args)
    if options.model:
        named_class("model", options.model)  # imports it
    import_folder(Path(options.folder), Path(options.out))
    print(options.out)
    return 0
