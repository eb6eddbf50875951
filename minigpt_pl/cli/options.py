"""Options by name: which exist, which are reserved, and how two configurations differ.

How the user's options are read is in `given_options`; how they are parsed, and what is built from them, in `app`; what
--help shows of them in `help`; how a mistake in one is reported in `errors`.
"""

import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import docstring_parser
from lightning.pytorch import Trainer

from minigpt_pl.cli.classes import config_classes
from minigpt_pl.cli.prompts import PredictConfig
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.runtime.ranges import OpenUnitInterval, PositiveFloat, PositiveInt, Probability, Seed
from minigpt_pl.runtime.user_classes import own_arguments
from minigpt_pl.training.checkpointing import CheckpointConfig
from minigpt_pl.training.lit_modules import AblationLM, ClassicLM, ModernLM
from minigpt_pl.training.loggers import WandbConfig
from minigpt_pl.training.sampling import SampleCallback
from minigpt_pl.training.stopping import ValLossEarlyStopping

HOME = Path(__file__).parents[1] / "shipped"
CONFIGS = (HOME if HOME.exists() else HOME.parents[1]) / "configs"


PATH_OPTIONS = {"run_dir": "runs/first", "ckpt_path": "last"}  # only on the command line, in no configuration; examples
LINKED = {  # options whose value follows from another one: what to do instead
    "model.vocab_size": ("its value follows from the tokenizer", "leave it out"),
    "data.block_size": ("its value follows from the model", "use --model.block_size"),
    "data.seed": ("one seed is used for the whole run", "use --seed_everything"),
}
RESERVED = {  # Trainer options that would make a file or a metric wrong: why, and what to do instead
    "default_root_dir": ("a run has its own directory", "use --run_dir"),
    "enable_checkpointing": ("a run always saves its checkpoints", "use --trainer.fast_dev_run true to try an option"),
    "min_epochs": ("a run counts steps", "use --trainer.min_steps"),
    "reload_dataloaders_every_n_epochs": ("a batch depends on the step alone", "leave it out"),
    "use_distributed_sampler": ("each device reads its own windows already", "leave it out"),
    "barebones": ("it would switch off what a run records", "use --wandb null and --samples null"),
    "model_registry": ("models stay on this machine", "use --wandb.log_best true"),
}
TRAINER_HELP = {  # the Trainer options that --help lists; --trainer.help lists the others, in Lightning's words
    "max_steps": "Optimizer steps in total, including those before a resume.",
    "max_time": "Longest training time, as DD:HH:MM:SS.",
    "gradient_clip_val": "Largest norm of the gradient; null for no clipping.",
    "accumulate_grad_batches": "Micro-batches in one optimizer step.",
    "log_every_n_steps": "Steps between two logged training metrics.",
    "accelerator": "cpu, mps, cuda, or auto.",
    "devices": "Number of devices.",
    "strategy": "ddp for several devices.",
    "precision": "32-true or bf16-mixed, among others.",
    "callbacks": "More callbacks, by class.",
    "fast_dev_run": "Try one step, or so many, and write nothing.",
}
TRAINER_TYPES = {  # stricter than Lightning's own, which fails late or not at all
    "max_steps": PositiveInt,
    "accumulate_grad_batches": PositiveInt,
    "num_nodes": PositiveInt,
    "log_every_n_steps": PositiveInt | None,
    "gradient_clip_val": PositiveFloat | None,
}
FIT_ONLY = {
    "max_steps", "max_time", "gradient_clip_val", "accumulate_grad_batches", "log_every_n_steps", "min_steps",
    "gradient_clip_algorithm", "fast_dev_run", "overfit_batches", "limit_train_batches", "num_sanity_val_steps",
    "val_check_interval", "check_val_every_n_epoch", "max_epochs", "enable_model_summary", "logger",
}  # fmt: skip
"""Trainer options that only `fit` has."""
SECTIONS = ("fit", "validate", "test", "predict")


MODEL_HELP = "ModernLM, ClassicLM, AblationLM (a stage between the two), or module.Class of your own."


class OptionSpec(NamedTuple):
    """An option: its type, its default, one sentence of help, and a class that has it if not all do, or ""."""

    type: Any
    default: Any = inspect.Parameter.empty
    help: str = ""
    only: str = ""


FIT_SPECS = {
    "init_from": OptionSpec(str, "", "Checkpoint whose weights a new run begins with, also on another text."),
    "ema_decay": OptionSpec(
        OpenUnitInterval | None, None, "Decay of averaged weights, which are evaluated; null for none."
    ),
    "teachers": OptionSpec(str | list[str], "", "Run directories or checkpoints that the model learns from too."),
    "teacher_weight": OptionSpec(Probability, 0.5, "Share of the teachers in the loss."),
    "tensorboard": OptionSpec(bool, False, "Write metrics and samples for TensorBoard too."),
}
FIT_GROUPS = {"early_stopping", "checkpoint", "samples", "wandb", *FIT_SPECS}


@cache
def option_specs(command: str, *user_classes: Any) -> dict[str, OptionSpec]:
    """Every option of a command by its dotted name, in the order of --help, with those of some classes of the user."""
    fits = command == "fit"
    groups: dict[str, list[Any]] = {"sample": [PredictConfig]} if command == "predict" else {}
    data = [cls for cls in user_classes if issubclass(cls, TextDataModule)]
    models = [cls for cls in user_classes if cls not in data]
    groups |= {"model": [ModernLM, ClassicLM, AblationLM, *models], "data": [TextDataModule, *data]}
    if fits:
        groups |= {"early_stopping": [ValLossEarlyStopping], "checkpoint": [CheckpointConfig]}
        groups |= {"samples": [SampleCallback], "wandb": [WandbConfig]}
    run_dir = "The run's directory. Default: runs/TIME-MODEL." if fits else "Directory of --ckpt_path last and best."
    start = "a file, or last in --run_dir" if fits else "a file, or last or best in --run_dir"
    specs = {
        "config": OptionSpec(str, help="YAML file, or a shipped one such as modern or journey/p2_refine."),
        "run_dir": OptionSpec(str, "", run_dir),
        "ckpt_path": OptionSpec(str, None, f"Checkpoint to start from: {start}."),
        **(FIT_SPECS if fits else {}),
        "seed_everything": OptionSpec(Seed, help="Seed of everything in a run that is random."),
        "print_config": OptionSpec(None, help="Print the resolved configuration, as a file for --config, and exit."),
        "model": OptionSpec(type, "ModernLM", MODEL_HELP),
    }
    for group, classes in (groups | {"trainer": [Trainer]}).items():
        members = [class_options(cls) for cls in classes]
        for cls, options in zip(classes, members, strict=True):
            for name, spec in options.items():
                if cls is Trainer and (name in RESERVED or not fits and name in FIT_ONLY):
                    continue
                only = "" if all(name in other for other in members) else cls.__name__
                if f"{group}.{name}" not in LINKED:
                    specs.setdefault(f"{group}.{name}", spec._replace(only=only))
    return specs


def option_type(full_name: str) -> Any:
    """The type of an option as it may stand in a file, of `fit` or of `predict`; Any for one that is not known."""
    name = option_name(full_name)
    for section in SECTIONS:
        name = name.removeprefix(f"{section}.")
    if name in FIT_GROUPS - {"checkpoint"}:
        return dict | None
    spec = option_specs("fit").get(name) or option_specs("predict").get(name)
    return spec.type if spec else Any


def class_options(cls: Any) -> dict[str, OptionSpec]:
    """The documented arguments of a class; those of a model or of data are the fields of its config_class.

    A user's class also has the arguments that its own constructors name.
    """
    owner = getattr(cls, "config_class", cls)
    hints, parameters = get_type_hints(owner.__init__), inspect.signature(owner).parameters
    bases = owner.__mro__[::-1] if hasattr(owner, "__dataclass_fields__") else [owner]
    own = own_arguments(cls) if owner is not cls else {}
    bases = [*bases, cls, cls.__init__] if own else bases
    texts: dict[str, str] = {}
    for part in [Trainer.__init__] if owner is Trainer else bases:
        arguments = docstring_parser.parse(part.__doc__ or "").params
        texts |= {argument.arg_name: " ".join((argument.description or "").split()) for argument in arguments}
    if owner is Trainer:
        texts, hints = {**TRAINER_HELP, **texts, **TRAINER_HELP}, hints | TRAINER_TYPES
    known = {name: text for name, text in texts.items() if name in parameters}
    specs = {name: OptionSpec(hints[name], parameters[name].default, text) for name, text in known.items()}
    return specs | {name: OptionSpec(a.annotation, a.default, texts.get(name, "")) for name, a in own.items()}


class UserOption(NamedTuple):
    """One option as the user gave it; str() is how a message names it."""

    name: str
    """Dotted, without init_args."""
    value: Any
    """On the command line the argument after the name, None if there is none; in a file the YAML value."""
    typed: str
    """The name as typed: --data.batch_size on the command line, data.batch_size in a file."""
    file: str = ""

    def __str__(self) -> str:
        text = "" if self.value is None and not self.file else as_text(self.value) or "''"
        return f"{self.typed} {text[:200]}".strip() + (f" in {self.file}" if self.file else "")


def as_text(value: Any) -> str:
    """A value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def option_name(name: str) -> str:
    return re.sub(r"\.(init_args|class_path)\b|(?<=^data)_class$", "", name.lstrip("-")).rstrip("+")


def flatten(node: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested configuration."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def config_diff(
    before: dict[str, Any], after: dict[str, Any], prefix: str = "", classes: tuple[Any, ...] | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """Values that differ between two nested configurations: dotted name, before, after.

    An option that only the newer one has is no difference while it has its default value; those of the user's own
    `classes` are known too, by default those of the newer configuration.
    """
    classes = config_classes(after) if classes is None else classes
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from config_diff(old, new, f"{prefix}{name}.", classes)
        elif old != new and not (name in ("class_path", "data_class") and _same_class(old, new)):
            spec = option_specs("fit", *classes).get(option_name(f"{prefix}{name}"))
            if name in before or spec is None or new != spec.default:
                yield f"{prefix}{name}", old, new


def _same_class(old: Any, new: Any) -> bool:
    """Whether two import paths name one class, which may have moved to another file."""
    return str(old).rpartition(".")[2] == str(new).rpartition(".")[2]
