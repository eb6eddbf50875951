"""Mistakes in options: how they are found, and how they are reported, with the option as the user typed it.

Mistakes in a text, a checkpoint or a run directory are found where those are read.
"""

import os
import re
from argparse import ArgumentError
from collections.abc import Iterable
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import callbacks
from lightning.pytorch.accelerators import AcceleratorRegistry

from minigpt_pl.cli import options
from minigpt_pl.cli.classes import CLASSES, class_name, config_classes, line_in, named_class, named_classes
from minigpt_pl.cli.options import UserOption, as_text, option_name, option_specs
from minigpt_pl.runtime.errors import UserError, one_line
from minigpt_pl.runtime.ranges import describe_range
from minigpt_pl.runtime.user_classes import is_own
from minigpt_pl.training.refused_strategies import check_strategy

OPTIONAL_GROUPS = ("early_stopping", "samples", "wandb")  # null disables them
GROUPS = ("model", "data", "trainer", "checkpoint", "sample", *OPTIONAL_GROUPS)
MAX_NUMBER = 10**12  # more is a typing error, and some options would be counted up to
MAX_VOCAB_SIZE = 10**6  # where memory is short, the tokenizers library ends the process without an error
LOWER_SIZES = "--model.n_layer, --model.n_embd or --model.n_experts"
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def name_as_typed(error: UserError, user_options: list[UserOption]) -> UserError:
    """The error about the option as the user typed it, if the user gave that option."""
    typed = [str(option) for option in user_options if error.option and option.name == error.option]
    return UserError(error.format(typed[-1])) if typed else error


# Before parsing: each option by itself.


def check_options(user_options: list[UserOption], command: str, model: Any = None, data: Any = None) -> None:
    """Raises UserError for an option that the command or a class does not have, or whose value is not of its type.

    `model` and `data` are the classes, unless the user names others; without them, whether they have an option is not
    checked.
    """
    current = {"model": model, "data": data}
    final = current | named_classes(user_options)
    for option in user_options:
        if option.name in CLASSES:
            current |= named_classes([option])
        # An option on the command line is meant for the final class, an option in a file for the class at that point.
        if found := option_problem(option, command, current if option.file else final):
            raise UserError(f"{option}: {found[0]}", remedy=found[1])


def option_problem(option: UserOption, command: str, classes: dict[str, Any]) -> tuple[str, str] | None:
    """What is wrong with one option, and the remedy; None if nothing is.

    `classes` are those of the model and of the data, None where that is not known.
    """
    own = [cls for cls in classes.values() if cls and not is_own(cls)]
    specs, name, value = option_specs(command, *own), option.name, option.value
    dashes = "" if option.file else "--"
    if not name:
        return "this is not an option", "option names begin with --"
    if name in options.LINKED:
        return options.LINKED[name]
    if name in options.PATH_OPTIONS and option.file:
        return ("a file cannot set this option", f"use --{name} {value} on the command line") if value else None
    if name in options.PATH_OPTIONS and not value:
        return "its value is missing", f"write for example --{name} {options.PATH_OPTIONS[name]}"
    if value is None and not option.file and name in {*specs, *GROUPS} - {"print_config"}:
        return "its value is missing", f"a value that begins with -- is written {option.typed}=VALUE"
    if name in GROUPS:
        return group_problem(option, next(spec for spec in specs if spec.startswith(f"{name}.")))
    if name in specs:
        spec, (group, _, argument) = specs[name], name.partition(".")
        if (cls := classes.get(group)) and argument and argument not in options.class_options(cls):
            return f"{cls.__name__} has no such option", f"use --{group} {spec.only}, or leave it out"
        problem = None if type_accepts(spec.type, value) else describe_type(spec.type, name)
        return (problem, "") if problem else None
    if (reserved := name.removeprefix("trainer.")) in options.RESERVED and reserved != name:
        return options.RESERVED[reserved]
    if any(name.startswith(f"{spec}.") for spec in specs if spec.startswith("trainer.")):
        return None  # an argument of a class that the user named: the parser knows it
    for other in ("fit", "predict"):
        if name in option_specs(other):
            return f"only {other} has this option", "leave it out"
    near = closest_match(name, specs)
    hint = f"did you mean {dashes}{near}?" if near else f"minigpt {command} --help lists the options"
    return "there is no such option", hint


def group_problem(option: UserOption, example: str) -> tuple[str, str] | None:
    """What is wrong with a value of a whole group, such as --model ModernLM or --wandb null."""
    optional = option.name in OPTIONAL_GROUPS
    if as_text(option.value).startswith("{") or optional and option.value in (None, "null"):
        return None
    if option.name in CLASSES and named_class(option.name, option.value):
        return None
    if option.name == "model":
        known = [name for name, cls in CLASSES["model"].items() if is_own(cls)]
        near = closest_match(as_text(option.value), known)
        hint = f"did you mean {near}?" if near else f"use one of {', '.join(known)}, or module.Class of your own"
        return "there is no such model", hint
    dashes = "" if option.file else "--"
    remedy = f"set one of them, such as {dashes}{example}"
    return "this is a group of options", f"use null to disable it, or {remedy}" if optional else remedy


def closest_match(name: str, names: Iterable[str]) -> str | None:
    """The name that a misspelt one may mean; its group may be missing."""
    last = name.rpartition(".")[2]
    known = {one.rpartition(".")[2]: one for one in reversed(list(names))} | {one: one for one in names}
    for wanted, cutoff in ((last, 1.0), (name, 0.75), (last, 0.7)):
        if near := get_close_matches(wanted, known, n=1, cutoff=cutoff):
            return known[near[0]]
    return None


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
    """The values of a type in words; None for a type that has classes in it."""
    words: list[str] = []
    for member in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(member) is Literal:
            words += map(str, get_args(member))
        else:
            words.append(describe_range(member) or TYPE_WORDS.get(member, ""))
    common = options.TRAINER_HELP.get(name.removeprefix("trainer."), "").rstrip(".")
    text = common if common and len(words) > 4 else " or ".join(words).replace(" or null", ", or null")
    return None if "" in words else f"it must be {text}"


def explain_parse_error(error: ArgumentError, user_options: list[UserOption]) -> UserError:
    """What the parser alone can know: the arguments of classes that the user named."""
    message = str(error)
    found = re.search(r'(?:Parser key "|[Oo]ption \'|argument --)([\w.]+)', message)
    key = option_name(found[1]) if found else ""
    named = [option for option in user_options if key and key not in GROUPS and option.name.startswith(key)]
    subject = named[-1] if named else key or "an option"
    problem, remedy = "this value cannot be used here", ""
    if found := re.search(r"(?:dot import path string: |has no attribute ')(\w+)", message):
        near = get_close_matches(found[1], callbacks.__all__, n=1)
        problem, remedy = f"there is no class {found[1]}", f"did you mean {near[0]}?" if near else ""
    elif found := re.search(r"arguments are required: ([\w.]+)", message):
        problem = f"the class also needs the argument {found[1]}"
    elif found := re.search(r"Option '(\w+)' is not accepted", message):
        problem = f"the class has no argument {found[1]}"
    return UserError(f"{subject}: {problem}", remedy=remedy)


# After parsing: what depends on the machine, or on several options.


def check_config(config: dict[str, Any]) -> None:
    """Raises UserError for values that neither the parser nor a constructor refuses, of a checkpoint or of the user."""
    plain = {option_name(name): value for name, value in options.flatten(config)}
    specs = option_specs("fit", *config_classes(config))

    def require(name: str, good: bool, problem: str, remedy: str = "") -> None:
        if not good:
            raise UserError(problem, option=name, value=plain[name], remedy=remedy)

    for name, value in plain.items():
        hint = specs[name].type if name in specs else Any
        if value is None and hint not in (Any, None, NoneType):  # the parser turns the text ~ into null
            require(name, NoneType in get_args(hint), describe_type(hint, name) or "it must not be null")
        most = MAX_VOCAB_SIZE if name == "data.bpe_vocab_size" else MAX_NUMBER
        require(name, not isinstance(value, int) or abs(value) <= most, f"it must be at most {most:,}")
    for name, hint in ((f"trainer.{name}", hint) for name, hint in options.TRAINER_TYPES.items()):
        require(name, name not in plain or type_accepts(hint, plain[name]), describe_type(hint, name) or "")
    time = plain.get("trainer.max_time")
    good = not isinstance(time, str) or bool(re.fullmatch(r"\d+:\d\d:\d\d:\d\d", time))
    require("trainer.max_time", good, "it must have the form DD:HH:MM:SS, such as 00:01:30:00")

    check_strategy(config["trainer"].get("strategy"))
    here = [name for name in ("cpu", "cuda", "mps") if AcceleratorRegistry.get(name).is_available()]
    wanted = plain["trainer.accelerator"] if isinstance(plain["trainer.accelerator"], str) else "auto"
    good = wanted in (*here, "auto", "tpu") or wanted == "gpu" and len(here) > 1
    require("trainer.accelerator", good, f"this machine has {' and '.join(here)}", "auto uses the best of them")
    precision = canonical_precision(plain.get("trainer.precision"))
    half = precision.startswith("16") or precision == "transformer-engine-float16"  # its infinities would stay in Muon
    require("trainer.precision", not half, "fp16 is not supported", "use 32-true or bf16-mixed")
    device = {"auto": here[-1], "gpu": here[-1]}.get(wanted, wanted)
    leaks = mps_attention_leaks(torch.__version__, device, precision)
    problem = f"with torch {torch.__version__} on MPS, attention sees later tokens in this precision"
    require("trainer.precision", not leaks, problem, "use torch 2.13 or newer, or 32-true")
    most, devices = max(8, 2 * (os.cpu_count() or 1)), str(plain["trainer.devices"])
    listed = devices.startswith("[") or "," in devices
    good = listed or devices in ("auto", "-1") or devices.isdigit() and 1 <= int(devices) <= most
    require("trainer.devices", good, f"it must be auto, or a number from 1 to {most}")
    require("data.num_workers", plain["data.num_workers"] <= most, f"it must be at most {most} on this machine")


def canonical_precision(precision: Any) -> str:
    """One name for each precision: Lightning has several for some."""
    return {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}.get(str(precision), str(precision))


def mps_attention_leaks(torch_version: str, device: str, precision: str) -> bool:
    """Whether causal attention sees later tokens: on MPS in less than fp32, before torch 2.13."""
    version = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2])
    return device == "mps" and precision != "32-true" and version < (2, 13)


def check_memory(config: dict[str, Any], vocab_size: int) -> None:
    """Raises UserError for a model or a batch that is far too large for the memory of this machine."""
    cls, sizes = CLASSES["model"][class_name(config)], config["model"]["init_args"] | {"vocab_size": vocab_size}
    try:
        with torch.device("meta"):  # shapes without numbers
            net = cls(**sizes | {"n_layer": 1, "compile": False}).net
    except (RuntimeError, OverflowError, TypeError) as error:
        if is_own(cls):
            raise UserError("the model is much too large", remedy=f"lower {LOWER_SIZES}") from None
        if isinstance(error, TypeError):  # a mistake in the class
            raise
        problem = f"{cls.__name__} cannot be built on torch's meta device, as a checkpoint's sizes are checked there"
        remedy = "compute with numbers in on_fit_start, not in __init__"
        raise UserError(f"{problem} ({one_line(error)}){line_in(cls.__module__, error)}", remedy=remedy) from None
    weights = sum(p.numel() for p in net.parameters())
    weights += sum(p.numel() for p in net.blocks.parameters()) * (sizes["n_layer"] - 1)
    tokens = config["data"]["batch_size"] * sizes["block_size"]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else MAX_NUMBER
    for needed, what, lower in (
        (16 * weights, "the model", LOWER_SIZES),  # also gradients, and two moments in the optimizer
        (12 * tokens * vocab_size, "a batch", "--data.batch_size or --model.block_size"),  # logits and their gradients
    ):
        if needed > memory:
            problem = f"{what} needs {needed / 2**30:,.0f} GiB of memory, but this machine has {memory / 2**30:,.0f}"
            raise UserError(problem, remedy=f"lower {lower}")


def unused_options(user_options: list[UserOption], config: dict[str, Any], command: str) -> dict[str, str]:
    """A line for each option on the command line that has no effect, by its name."""
    plain = {option_name(name): value for name, value in options.flatten(config)}
    reasons = {  # by the beginning of a name
        "model.moe_": "model.n_experts is 0" if plain.get("model.n_experts") == 0 else "",
        "model.muon_lr": "model.optimizer is adamw" if plain["model.optimizer"] == "adamw" else "",
        "data.eval_iters": "data.eval_mode is full" if plain["data.eval_mode"] == "full" else "",
        "data.max_eval_tokens": "data.eval_mode is sampled" if plain["data.eval_mode"] == "sampled" else "",
        "sample.top_": "sample.temperature is 0" if plain.get("sample.temperature") == 0 else "",
        "data.bpe_": "data.tokenizer is char" if plain["data.tokenizer"] == "char" else "",
        "data.split_unit": "data.tokenizer is char" if plain["data.tokenizer"] == "char" else "",
        "data.": "predict does not read the text" if command == "predict" else "",
        "trainer.precision": "predict always computes in fp32" if command == "predict" else "",
        "trainer.devices": "predict always uses one device" if command == "predict" else "",
    }
    if command != "fit":
        names = ("lr", "muon_lr", "dropout", "weight_decay", "lr_schedule", "moe_aux_loss_coef")
        reasons |= dict.fromkeys(["data.eval_every", *(f"model.{name}" for name in names)], f"{command} does not train")
    unused = {
        option.name: f"{option} has no effect: {reason}"
        for option in user_options
        for prefix, reason in reasons.items()
        if reason and not option.file and option.name.startswith(prefix)
    }
    top_1 = command == "fit" and plain.get("model.n_experts") and plain["model.moe_top_k"] == 1
    if top_1 and plain["model.moe_gate"] == "softmax_selected":
        note = "with model.moe_top_k 1 the router learns from the balance loss alone"
        unused["moe_gate"] = f"model.moe_gate softmax_selected: {note}"
    return unused


# While a run is built.


def as_user_error(error: BaseException, user_options: list[UserOption]) -> UserError:
    """The user's mistake behind an error of a constructor, however deep a library has wrapped it."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, UserError):
            return cause
    message = str(causes[-1]).replace("`", "").split(". ")[0]
    for module in {cls.__module__ for cls in named_classes(user_options).values()}:
        if where := line_in(module, causes[-1]):
            return UserError(f"{type(causes[-1]).__name__}: {message}{where}")
    for option in user_options:  # Lightning names its argument or the value
        argument = option.name.removeprefix("trainer.")
        mentioned = f"'{option.value}'" in message or re.search(rf"\b{re.escape(argument)}\b", message)
        if argument != option.name and mentioned:
            return UserError(message, option=option.name, value=option.value)
    return UserError(message)
