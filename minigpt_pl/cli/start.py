"""Where a command starts: the checkpoint that is named, what of its configuration counts, and what the user changes.

How the file is read safely is in `checkpoint`.
"""

from pathlib import Path
from typing import Any

from minigpt_pl.checkpoint.io import RUN_KEYS, read_checkpoint
from minigpt_pl.checkpoint.run_dir import find_checkpoint
from minigpt_pl.checkpoint.validation import validate_config, validate_sizes
from minigpt_pl.cli import errors
from minigpt_pl.cli.classes import class_name
from minigpt_pl.cli.options import FIT_SPECS, UserOption, class_options, config_diff, option_name
from minigpt_pl.data.datamodule import DATA_MODULES, TextDataModule, datamodule_of
from minigpt_pl.models.gpt import GPT
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.user_classes import import_path
from minigpt_pl.training.lit_modules import MODELS, from_checkpoint

IMMUTABLE_DATA = (
    "data.tokenizer", "data.bpe_vocab_size", "data.bpe_min_pair_freq", "data.bpe_across_lines", "data.bpe_train_on",
    "data.train_frac", "data.split_unit",
)  # fmt: skip
"""Fixed by a checkpoint: with other values its metrics would mean something else."""


def path_option(name: str, given: list[UserOption], command: str) -> str:
    """--run_dir or --ckpt_path, which decide what else is read; "" if not given."""
    matching = [option for option in given if option.name == name]
    errors.check_options(matching, command)
    return next((option.value for option in reversed(matching) if not option.file), "")


def find_start(start: str, run_dir: str, command: str) -> Path | None:
    """The checkpoint file that --ckpt_path, `start`, names; None for a new run of `fit`."""
    if not start and command != "fit":
        remedy = "use --ckpt_path FILE, or --run_dir DIR --ckpt_path best (or last)"
        raise UserError(f"{command} needs a checkpoint", remedy=remedy)
    path = find_checkpoint(start, run_dir) if start else None
    if command == "fit" and start == "best":
        remedy = f"to fork it from its best step, use --ckpt_path {path} --run_dir NEW"
        raise UserError("a run can only be resumed from last", option="ckpt_path", value=start, remedy=remedy)
    return path


def read_start(
    path: Path | None, args: list[str], fits: bool, data_class: type[TextDataModule] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint, and the part of its configuration that a command starts from; both are empty without a file.

    Args:
        path: The file, or None.
        args: The command line.
        fits: Whether the command is `fit`; the others take less from it.
        data_class: The class of the data that the user names, or None.
    """
    if path is None:
        return {}, {}
    checkpoint = read_checkpoint(path)
    if not checkpoint.keys() >= ({"TextDataModule"} | (RUN_KEYS if fits else set())):
        able = "predict and validate can read it" if "TextDataModule" in checkpoint else "it has no tokenizer"
        remedy = "name a checkpoint of minigpt fit"
        raise UserError(f"minigpt fit did not write it: {able}", option="ckpt_path", value=path, remedy=remedy)
    config = checkpoint["config"]
    if data_class is not None and isinstance(config, dict):  # which class the checkpoint names does not matter then
        config = config | {"data_class": import_path(data_class)}
    if not fits and isinstance(config, dict):  # they need no callback or plugin of the run
        config = config | {"trainer": {}}
    config = validate_config(config, path, args, MODELS, DATA_MODULES)
    validate_sizes(checkpoint, MODELS)
    if data_class is not None:  # it may have fewer options than the checkpoint's
        known = class_options(data_class)
        config["data"] = {name: value for name, value in config["data"].items() if name in known}
    # The seed decides which windows a sampled evaluation reads.
    evaluated = ("model", "data", "data_class", "seed_everything")
    return checkpoint, {key: value for key, value in config.items() if fits or key in evaluated}


def read_model(path: Path, text_path: str) -> tuple[dict[str, Any], GPT, TextDataModule]:
    """A checkpoint, its network in eval mode, and its text: at `text_path`, or if that is "", where the run read it."""
    checkpoint, config = read_start(path, [], False, None)
    data = datamodule_of(config)
    data.load_state_dict(checkpoint["TextDataModule"])
    data.path = text_path or data.checkpoint["text_path"]
    return checkpoint, from_checkpoint(checkpoint).net, data


def changes(
    path: Path | None, checkpoint: dict[str, Any], base: dict[str, Any], resolved: dict[str, Any], fits: bool
) -> dict[str, str]:
    """A line for each difference of the resolved configuration from the checkpoint's, in the part `base`, by option.

    Raises:
        UserError: If an option contradicts the weights or the text of the checkpoint.
    """
    if path is None:
        return {}
    default: dict[str, Any] = {"data_class": "TextDataModule"}
    default |= {name: spec.default for name, spec in FIT_SPECS.items()} if fits else {}
    names, configs = {*base, *default}, (checkpoint["config"], resolved)
    before, after = ({k: v for k, v in (default | config).items() if k in names} for config in configs)
    fixed = before["model"]["init_args"].keys() - MODELS[class_name(after)].mutable_args
    fixed = {"model", *(f"model.{name}" for name in fixed), *IMMUTABLE_DATA}
    fixed |= {"data.test_frac"} if fits else set()
    if resolved.get("ema_decay") is None:  # the weights are an average; switching it on later is possible
        fixed.add("ema_decay")
    lines = {}
    for full_name, old, new in config_diff(before, after):
        if (name := option_name(full_name)) == "init_from":
            problem = f"the weights are those of {path}, which the run continues"
            raise UserError(problem, option=name, value=new, remedy="use either --init_from or --ckpt_path")
        if name in fixed:
            problem = f"{path} was trained with {str(old).removeprefix('minigpt_pl.')}"
            raise UserError(problem, option=name, value=new, remedy="leave it out, or train a new model")
        lines[name] = f"{name}: {old} -> {new}"
    return lines
