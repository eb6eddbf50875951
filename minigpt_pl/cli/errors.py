"""What a user may get wrong in a setting, and how it is said: the option as it was typed, its value, what to do.

What is wrong with a text, a checkpoint or a run directory is said where those are read.
"""

import os
import re
from argparse import ArgumentError
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import callbacks
from lightning.pytorch.accelerators import AcceleratorRegistry

from minigpt_pl.cli.options import (
    LINKED,
    PATH_OPTIONS,
    RESERVED,
    TRAINER_HELP,
    UserOption,
    as_text,
    closest_match,
    flatten,
    option_name,
    option_specs,
)
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.lit_modules import MODELS

NULLABLE_GROUPS = {
    "model": False,
    "data": False,
    "trainer": False,
    "checkpoint": False,
    "sample": False,
}  # whether null does without
NULLABLE_GROUPS |= {"early_stopping": True, "samples": True, "wandb": True}
MAX_NUMBER = 10**12  # no setting is meant to be more, and some would be counted to
MAX_VOCAB_SIZE = 10**6  # of a vocabulary: the tokenizers library ends the process where it has no memory for more


def flat_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Resolved settings by their dotted names."""
    return {option_name(name): value for name, value in flatten(settings)}


# Before parsing: what the parser would let pass.


def validate_options(given: list[UserOption]) -> None:
    """Raises InputError for settings that follow others, for places in a file, for groups and models that are none."""
    examples = {"run_dir": "runs/first", "ckpt_path": "last", "data.path": "data/input.txt"}
    for one in given:
        if one.name in LINKED:
            raise UserError(f"{one}: {LINKED[one.name]}")
        if one.name in PATH_OPTIONS and one.file and one.value:
            raise UserError(f"{one}: give it on the command line, as --{one.name} {one.value}")
        if one.name in examples and not one.file and not one.value:
            raise UserError(f"{one.typed} needs a value, such as {examples[one.name]}")
        absent = one.value is None and NULLABLE_GROUPS.get(one.name)
        if one.name in NULLABLE_GROUPS and one.file and not isinstance(one.value, (dict, str)) and not absent:
            raise UserError(f"{one}: its settings stand below it, each by its name")
        if one.name == "model" and (problem := option_error(one, "fit", "")):
            raise UserError(f"{one}: {problem}")


# After parsing has failed: why.


def explain_parse_error(error: ArgumentError, given: list[UserOption], command: str, model: str) -> str:
    """What the parser meant, in our words.

    Args:
        error: The parser's.
        given: What the user gave.
        command: fit, validate, test or predict.
        model: The class that the settings of the model are for, unless `given` names another.
    """
    named = [str(one.value).rpartition(".")[2] for one in given if one.name == "model"]
    model = next((name for name in reversed(named) if name in MODELS), model)
    for one in given:
        if problem := option_error(one, command, model):
            return f"{one}: {problem}"
    found = re.search(r'(?:Parser key "|[Oo]ption \'|argument --)([\w.]+)', str(error))
    key = option_name(found[1]) if found else ""
    culprit = next((one for one in reversed(given) if key and one.name.startswith(key)), key or "a setting")
    return f"{culprit}: {parser_error_cause(str(error))}"


def option_error(one: UserOption, command: str, model: str) -> str | None:
    """What is wrong with one setting by itself, or None."""
    known, (group, _, rest) = option_specs(command), one.name.partition(".")
    if not one.name:
        return "options begin with --"
    if one.value is None and not one.file and one.name in {*known, *NULLABLE_GROUPS} - {"print_config"}:
        return f"its value is missing; one that begins with -- is given as {one.typed}=VALUE"
    if one.name in NULLABLE_GROUPS:
        if as_text(one.value).startswith("{") or NULLABLE_GROUPS[one.name] and one.value in (None, "null"):
            return None
        name = str(one.value).rpartition(".")[2]
        if one.name == "model":
            near = closest_match(name, MODELS)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(MODELS)}"
            return None if name in MODELS else f"there is no such model; {hint}"
        example = next(name for name in known if name.startswith(f"{one.name}."))
        return f"give {'null for none, or ' * NULLABLE_GROUPS[one.name]}its settings by name, such as --{example}"
    if one.name in known:
        setting = known[one.name]
        if setting.only and setting.only != model:
            return f"{model} has no such setting: give --model {setting.only}, or leave it out"
        return None if type_accepts(setting.type, one.value) else describe_type(setting.type, one.name)
    if group == "trainer" and rest in RESERVED:
        return f"minigpt decides it: {'use ' + RESERVED[rest] if RESERVED[rest] else 'leave it out'}"
    if any(one.name.startswith(f"{name}.") for name in known if name.startswith("trainer.")):
        return None  # inside a class that the user named: the parser knows more
    for other in ("fit", "predict"):
        if one.name in option_specs(other):
            return f"only {other} has it: leave it out"
    near, dashes = closest_match(one.name, known), "" if one.file else "--"
    hint = f"did you mean {dashes}{near}?" if near else f"minigpt {command} --help lists them"
    return f"there is no such setting; {hint}"


def type_accepts(hint: Any, value: Any) -> bool:
    """Whether the parser takes a value as one of this type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_args([f"--value={as_text(value)}"])
    except ArgumentError:
        return False
    return True


def describe_type(hint: Any, name: str) -> str | None:
    """The values of a type in words; None of one with classes in it."""
    plain = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
    words: list[str] = []
    for member in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        words += map(str, get_args(member)) if get_origin(member) is Literal else [plain.get(member, "")]
    if "a finite number" in words and "a whole number" in words:
        words.remove("a whole number")
    many = TRAINER_HELP.get(name.removeprefix("trainer."), "").rstrip(".")
    return None if "" in words else f"it must be {many if many and len(words) > 4 else ' or '.join(words)}"


def parser_error_cause(message: str) -> str:
    """The telling words of the parser."""
    if found := re.search(r"(?:dot import path string: |has no attribute ')(\w+)", message):
        near = closest_match(found[1], callbacks.__all__)
        return f"there is no class {found[1]}" + (f"; did you mean {near}?" if near else "")
    if found := re.search(r"arguments are required: ([\w.]+)", message):
        return f"it needs {found[1]} too"
    if found := re.search(r"Option '(\w+)' is not accepted", message):
        return f"its class has no {found[1]}"
    return "it is not accepted here"


# After parsing: what no constructor sees.


def validate_config_values(settings: dict[str, Any], given: list[UserOption]) -> None:
    """Raises InputError for numbers that no constructor looks at, and for options of another model."""
    plain, model = flat_config(settings), settings["model"]["class_path"].rpartition(".")[2]
    for one in given:  # a file may hold another model's settings, an option is meant for this one
        if not one.file and one.name.startswith("model.") and (problem := option_error(one, "fit", model)):
            raise UserError(f"{one}: {problem}")

    def check(name: str, good: bool, remedy: str) -> None:
        if not good:
            raise UserError(f"{name} is {plain[name]}: {remedy}")

    for name, setting in option_specs("fit").items():
        absent = plain.get(name, "") is None and name.partition(".")[0] in NULLABLE_GROUPS
        absent = absent and (
            setting.type is str or not type_accepts(setting.type, None)
        )  # the parser makes null of a text ~
        check(name, not absent, describe_type(setting.type, name) or "")
    check("seed_everything", 0 <= plain["seed_everything"] < 2**32, "it must be at least 0 and below 2^32")
    for name, value in plain.items():
        most = MAX_VOCAB_SIZE if name == "data.bpe_vocab_size" else MAX_NUMBER
        check(name, not isinstance(value, int) or abs(value) <= most, f"it must be at most {most:,}")
    for name in ("max_steps", "accumulate_grad_batches", "log_every_n_steps", "num_nodes"):
        value = plain.get(f"trainer.{name}")
        check(f"trainer.{name}", value is None or value >= 1, "it must be at least 1")
    clip, time = plain.get("trainer.gradient_clip_val"), plain.get("trainer.max_time")
    check("trainer.gradient_clip_val", clip is None or clip > 0, "it must be positive, or null for no clipping")
    good = not isinstance(time, str) or bool(re.fullmatch(r"\d+:\d\d:\d\d:\d\d", time))
    check("trainer.max_time", good, "write DD:HH:MM:SS, such as 00:01:30:00")

    here = [name for name in ("cpu", "cuda", "mps") if AcceleratorRegistry.get(name).is_available()]
    asked = plain["trainer.accelerator"] if isinstance(plain["trainer.accelerator"], str) else "auto"
    good = asked in (*here, "auto", "tpu") or asked == "gpu" and len(here) > 1
    check("trainer.accelerator", good, f"this machine has {' and '.join(here)}; auto takes the best")
    precision = canonical_precision(plain.get("trainer.precision"))
    half = precision.startswith("16") or precision == "transformer-engine-float16"
    check(
        "trainer.precision", not half, "fp16 is not supported: take 32-true or bf16-mixed"
    )  # Muon takes in infinities
    device = {"auto": here[-1], "gpu": here[-1]}.get(asked, asked)
    leaks = mps_attention_leaks(torch.__version__, device, precision)
    check(
        "trainer.precision", not leaks, f"torch {torch.__version__} leaks the future then: take torch 2.13, or 32-true"
    )
    most, devices = max(8, 2 * (os.cpu_count() or 1)), str(plain["trainer.devices"])
    listed = devices.startswith("[") or "," in devices
    good = listed or devices in ("auto", "-1") or devices.isdigit() and 1 <= int(devices) <= most
    check("trainer.devices", good, f"give auto, or a number from 1 to {most}")
    check("data.num_workers", plain["data.num_workers"] <= most, f"it must be at most {most} on this machine")


def canonical_precision(precision: Any) -> str:
    """A precision under the one name that Lightning means by several."""
    return {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}.get(str(precision), str(precision))


def mps_attention_leaks(torch_version: str, device: str, precision: str) -> bool:
    """Whether causal attention sees later tokens: on MPS in less than fp32, before torch 2.13."""
    version = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2])
    return device == "mps" and precision != "32-true" and version < (2, 13)


def validate_memory(settings: dict[str, Any], vocab_size: int) -> None:
    """Raises InputError for a model or a batch for which this machine has not nearly enough memory."""
    named, sizes = (
        settings["model"]["class_path"].rpartition(".")[2],
        settings["model"]["init_args"] | {"vocab_size": vocab_size},
    )
    tokens = settings["data"]["batch_size"] * sizes["block_size"]
    try:
        with torch.device("meta"):  # shapes without numbers
            net = MODELS[named](**{**sizes, "n_layer": min(1, sizes["n_layer"]), "compile": False}).net
    except (RuntimeError, OverflowError, TypeError):
        name = max(
            (name for name, value in sizes.items() if isinstance(value, (int, float))), key=lambda name: sizes[name]
        )
        raise UserError(f"model.{name} is {sizes[name]}: it must be much smaller") from None
    except ValueError as error:
        raise UserError(with_model_prefix(str(error))) from None
    weights = sum(p.numel() for p in net.parameters())
    weights += sum(p.numel() for p in net.blocks.parameters()) * (sizes["n_layer"] - 1)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else MAX_NUMBER
    for needed, what, lower in (
        (16 * weights, "the model", "model.n_layer, model.n_embd or model.n_experts"),  # gradients, AdamW's two moments
        (12 * tokens * vocab_size, "a batch", "data.batch_size or model.block_size"),  # logits and their gradients
    ):
        if needed > memory:
            sizes_in_gib = f"{needed / 2**30:,.0f} GiB of memory, and this machine has {memory / 2**30:,.0f}"
            raise UserError(f"{what} takes {sizes_in_gib}: lower {lower}")


def unused_options(given: list[UserOption], settings: dict[str, Any], command: str) -> dict[str, str]:
    """A line for each option on the command line that nothing will read, by its name."""
    plain = flat_config(settings)
    why = {
        "model.moe_": "model.n_experts is 0" if plain.get("model.n_experts") == 0 else "",
        "model.muon_lr": "model.optimizer is adamw" if plain["model.optimizer"] == "adamw" else "",
        "data.eval_iters": "data.eval_mode is full" if plain["data.eval_mode"] == "full" else "",
        "data.max_eval_tokens": "data.eval_mode is sampled" if plain["data.eval_mode"] == "sampled" else "",
        "sample.top_": "sample.temperature is 0" if plain.get("sample.temperature") == 0 else "",
        "data.bpe_": "data.tokenizer is char" if plain["data.tokenizer"] == "char" else "",
        "data.": "predict reads no text" if command == "predict" else "",
        "trainer.precision": "predict computes in fp32" if command == "predict" else "",
        "trainer.devices": "predict takes one device" if command == "predict" else "",
    }
    if command != "fit":
        training = ("lr", "muon_lr", "dropout", "weight_decay", "lr_schedule", "moe_aux_loss_coef")
        why |= dict.fromkeys([*(f"model.{name}" for name in training), "data.eval_every"], f"{command} does not train")
    found = {
        one.name: f"{one} has no effect: {reason}"
        for one in given
        for prefix, reason in why.items()
        if reason and not one.file and one.name.startswith(prefix)
    }
    one_of_many = plain.get("model.n_experts") and plain["model.moe_top_k"] == 1
    if command == "fit" and one_of_many and plain["model.moe_gate"] == "softmax_selected":
        gate = "model.moe_gate softmax_selected"
        found["moe_gate"] = f"{gate}: with model.moe_top_k 1 the router learns from the aux loss alone"
    return found


# While building.


def translate_error(error: BaseException, given: list[UserOption]) -> str:
    """What a constructor objected to, however deep a library has wrapped it."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    ours = [cause for cause in causes if isinstance(cause, UserError)]
    if ours:
        return str(ours[0])
    message = str(causes[-1]).replace("`", "")
    for one in given:
        option = one.name.removeprefix("trainer.")
        if one.name.startswith("trainer.") and (f"'{one.value}'" in message or re.search(rf"\b{option}\b", message)):
            return f"{one}: {message.split('. ')[0]}"
    return with_model_prefix(message)


def with_model_prefix(message: str) -> str:
    """The message of a model's constructor, which knows its arguments by their bare names."""
    names = sorted((name.removeprefix("model.") for name in option_specs("fit") if name.startswith("model.")), key=len)
    subject, colon, rest = message.partition(":")
    return re.sub(rf"(?<![\w.])({'|'.join(reversed(names))})\b", r"model.\1", subject) + colon + rest


def as_typed(message: str, given: list[UserOption], command: str) -> str:
    """A message that names settings by their dotted names, with names and values as the user typed them."""
    if message.startswith(tuple(str(one) for one in given)):
        return message
    known, typed, named = option_specs(command), {one.name: one for one in given}, []

    def replace(match: re.Match[str]) -> str:
        name = match[0]
        if name not in known:  # such as sample.temperature, of the samples of fit
            name = next((other for other in typed if other.endswith(f".{match[1]}")), name)
        if name in typed:
            named.append(typed[name])
        return typed[name].typed if name in typed else name

    message = re.sub(
        rf"(?<![\w./-])(?:(?:{'|'.join(NULLABLE_GROUPS)})\.(\w+)|seed_everything)\b(?![./])", replace, message
    )
    if named and message.startswith(f"{named[0].typed} is "):
        message = re.sub(r"^(\S+) is \S+(?=[:,])", lambda match: f"{match[1]} {as_text(named[0].value)}", message)
    if named and all(one.file and one.file not in message for one in named):
        message += f" ({named[0].file})"
    return message
