"""Settings by name: which there are, what the user gave, what may not be given, how two sets of them differ.

How they are parsed and what is built of them is in `cli`; what --help shows of them in `helptext`; how a mistake in one
is said in `mistakes`.
"""

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import docstring_parser
import yaml
from lightning.pytorch import Trainer

from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.generation.generate import SamplingConfig
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.lit_modules import AblationLM, ClassicLM, ModernLM
from minigpt_pl.training.loggers import WandbConfig
from minigpt_pl.training.sampling import SampleCallback
from minigpt_pl.training.stopping import ValLossEarlyStopping

HOME = Path(__file__).parents[1] / "shipped"
CONFIGS = (HOME if HOME.exists() else HOME.parents[1]) / "configs"


@dataclass
class PredictConfig(SamplingConfig):
    """What `predict` continues, and how.

    Args:
        prompt: What to continue; a newline unless given.
        prompt_file: A file of prompts, one a line.
        max_new_tokens: Tokens to add to a prompt.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Choose among the k likeliest; 0 for all.
        top_p: Choose among the likeliest that together reach this probability; 1 for all.
        seed: Of the choices; with the prompt and the sample's number it decides the text.
        num_samples: Continuations of each prompt.
    """

    prompt: str = ""
    prompt_file: str = ""


@dataclass
class CheckpointConfig:
    """When last.ckpt is saved, beside the run's first and last step.

    Args:
        every_n_train_steps: Steps between saves.
        every_n_minutes: Longest time between saves.
    """

    every_n_train_steps: int = 200
    every_n_minutes: float = 5.0


PATH_OPTIONS = ("run_dir", "ckpt_path")  # where, not what: given on the command line, stored nowhere
LINKED = {  # settings that follow another one
    "model.vocab_size": "it follows the tokenizer: leave it out",
    "data.block_size": "it is the model's: set --model.block_size",
    "data.seed": "the whole run has one: set --seed_everything",
}
RESERVED = {  # what the Trainer would let one set but this project decides, to count in one way: what to use instead
    "logger": "--wandb",
    "default_root_dir": "--run_dir",
    "enable_checkpointing": "--checkpoint.every_n_train_steps",
    **dict.fromkeys(["val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"], "--data.eval_every"),
    **dict.fromkeys(["max_epochs", "min_epochs", "fast_dev_run", "limit_train_batches"], "--trainer.max_steps"),
    **dict.fromkeys(["limit_val_batches", "limit_test_batches"], "--data.max_eval_tokens"),
    "limit_predict_batches": "--sample.max_new_tokens",
    "overfit_batches": "--data.path with a short text",
    "min_steps": "--early_stopping.patience",
    "gradient_clip_algorithm": "--trainer.gradient_clip_val",
    "reload_dataloaders_every_n_epochs": "", "use_distributed_sampler": "", "barebones": "", "model_registry": "",
    "inference_mode": "", "sync_batchnorm": "", "enable_model_summary": "",
}  # fmt: skip
TRAINER_HELP = {  # the settings of the Trainer that --help shows, in our words; --trainer.help shows the others in Lightning's
    "max_steps": "Optimizer steps in all, those before a resume included.",
    "max_time": "Longest time to train, DD:HH:MM:SS.",
    "gradient_clip_val": "The largest norm of the gradient; null is no limit.",
    "accumulate_grad_batches": "Micro-batches in an optimizer step.",
    "log_every_n_steps": "Steps between logged training figures.",
    "accelerator": "cpu, mps, cuda, or auto.",
    "devices": "How many of them.",
    "strategy": "ddp for several devices.",
    "precision": "32-true or bf16-mixed, among others.",
    "callbacks": "More callbacks, by class.",
}
FIT_ONLY = {"max_steps", "max_time", "gradient_clip_val", "accumulate_grad_batches", "log_every_n_steps"}
"""Options of the Trainer that only `fit` has."""


class OptionSpec(NamedTuple):
    """What is known of a setting: its type, default, one sentence, and the one model class that has it, or ""."""

    type: Any
    default: Any = inspect.Parameter.empty
    help: str = ""
    only: str = ""


@cache
def option_specs(command: str) -> dict[str, OptionSpec]:
    """Every setting of a command by its dotted name, in the order that --help shows."""
    groups: dict[str, tuple[type, ...]] = {"model": (ModernLM, ClassicLM, AblationLM), "data": (TextDataModule,)}
    if command == "fit":
        groups |= {
            "early_stopping": (ValLossEarlyStopping,),
            "checkpoint": (CheckpointConfig,),
            "samples": (SampleCallback,),
            "wandb": (WandbConfig,),
        }
    if command == "predict":
        groups = {"sample": (PredictConfig,), **groups}
    known = {
        "config": OptionSpec(str, help="Settings from a file, or a shipped one such as modern or journey/p2_refine."),
        "run_dir": OptionSpec(
            str, "", "Where a run writes; runs/TIME-MODEL unless given." if command == "fit" else "Where it lies."
        ),
        "ckpt_path": OptionSpec(str, None, "The checkpoint to start from: last or best in --run_dir, or a file."),
        "seed_everything": OptionSpec(int, help="Decides all that is random in a run."),
        "print_config": OptionSpec(
            None, help="Prints the resolved settings, as a file for --config, and does nothing."
        ),
        "model": OptionSpec(type, "ModernLM", "ModernLM, ClassicLM, or AblationLM for a step between."),
    }
    for group, classes in (groups | {"trainer": (Trainer,)}).items():
        for cls in classes:
            hints, parameters = get_type_hints(cls.__init__), inspect.signature(cls).parameters  # type: ignore[misc]
            documented = docstring_parser.parse((cls.__init__ if cls is Trainer else cls).__doc__ or "")
            texts = {argument.arg_name: argument.description or "" for argument in documented.params}
            texts = {**TRAINER_HELP, **texts, **TRAINER_HELP} if cls is Trainer else texts
            for name in (name for name in texts if name in parameters and f"{group}.{name}" not in LINKED):
                if cls is Trainer and (name in RESERVED or command != "fit" and name in FIT_ONLY):
                    continue
                only = cls.__name__ if not all(name in inspect.signature(other).parameters for other in classes) else ""
                setting = OptionSpec(hints[name], parameters[name].default, " ".join(texts[name].split()), only)
                known.setdefault(f"{group}.{name}", setting)
    return known


class UserOption(NamedTuple):
    """One setting as the user gave it."""

    name: str
    """Dotted, without init_args."""
    value: Any
    """The word that follows an option, None where it lacks; from a file, what stands there."""
    typed: str
    """The name as typed: --data.batch_size on the command line, data.batch_size in a file."""
    file: str = ""

    def __str__(self) -> str:
        text = "" if self.value is None and not self.file else as_text(self.value) or "''"
        return f"{self.typed} {text[:80]}".strip() + (f" in {self.file}" if self.file else "")


def as_text(value: Any) -> str:
    """A value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def option_name(name: str) -> str:
    return re.sub(r"\.(init_args|class_path)\b", "", name.lstrip("-")).rstrip("+")


def user_options(words: list[str]) -> list[UserOption]:
    """What a command line says, that of its files included, in its order.

    Raises:
        InputError: If a file cannot be read, or is no YAML of named settings.
    """
    found, rest = [], list(words)
    while rest:
        typed, equals, value = rest.pop(0).partition("=")
        if not typed.startswith("-"):
            found.append(UserOption("", typed + equals + value, ""))
            continue
        takes_next = not equals and rest and not re.match(r"-(?![\d.])", rest[0])
        given = UserOption(option_name(typed), value if equals else rest.pop(0) if takes_next else None, typed)
        if given.name in ("c", "config"):
            found += options_in_file(str(given.value), "")
        elif given.value and given.value.startswith("{"):
            found += options_in_braces(given)
        elif given.name in ("model", "data", "trainer") and given.value and Path(given.value).is_file():
            found += options_in_file(given.value, given.name)
        else:
            found.append(given)
    return found


def options_in_braces(given: UserOption) -> list[UserOption]:
    """The settings of a group that is given in one word, as JSON or YAML."""
    try:
        content = yaml.safe_load(given.value)
    except yaml.YAMLError:
        return [given]
    named = flatten(content, f"{given.name}.") if isinstance(content, dict) and content else [(given.name, given.value)]
    return [UserOption(option_name(name), value, f"--{option_name(name)}") for name, value in named]


def options_in_file(file: str, group: str) -> Iterator[UserOption]:
    """The settings of a YAML file, or of one that holds a group of them."""
    if not Path(file).is_file():  # a directory, or a pipe, which cannot be read twice
        raise UserError(f"-c {file} is no file: name a YAML file")
    try:
        content = yaml.safe_load(Path(file).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"-c {file} cannot be read ({error.strerror}): name a YAML file") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise UserError(f"-c {file} is not UTF-8: {byte}; convert the file to UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"-c {file} is not YAML: {getattr(error, 'problem', None) or error}{where}") from None
    if not isinstance(content, dict):
        kind = {list: "a list", type(None): "empty"}.get(type(content), "no settings")
        raise UserError(f"-c {file} is {kind}: write settings by name, such as data: {{batch_size: 16}}")
    return (
        UserOption(option_name(name), value, name.replace(".init_args", "").replace(".class_path", ""), file)
        for name, value in flatten(content, f"{group}." if group else "")
    )


def flatten(node: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested settings."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def closest_match(name: str, names: Iterable[str]) -> str | None:
    """The name that a misspelt one may have meant; its group may be missing."""
    names = list(names)
    last = name.rpartition(".")[2]
    of_last = {known.rpartition(".")[2]: known for known in reversed(names)}
    if last in of_last:
        return of_last[last]
    if near := get_close_matches(name, names, n=1, cutoff=0.75):
        return near[0]
    near = get_close_matches(last, of_last, n=1, cutoff=0.7)
    return of_last[near[0]] if near else None


def resolve_config_names(words: list[str]) -> list[str]:
    """The command line with each -c NAME that is no file replaced by the shipped file of that name."""

    def found(name: str) -> str:
        if Path(name).exists():
            return name
        for candidate in (CONFIGS / name, CONFIGS / f"{name}.yaml"):
            if candidate.is_file():
                return str(candidate)
        known = [str(path.relative_to(CONFIGS).with_suffix("")) for path in sorted(CONFIGS.rglob("*.yaml"))]
        near = get_close_matches(name.removesuffix(".yaml"), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(known[:5])} and others"
        raise UserError(f"-c {name}: there is no such file; {hint}")

    rest, out = list(words), []
    while rest:
        word = rest.pop(0)
        flag, equals, value = (word[:2], "=", word[2:].lstrip("=")) if re.match("-c.", word) else word.partition("=")
        if flag in ("-c", "--config"):
            if not (value := value if equals else rest.pop(0) if rest else ""):
                raise UserError(f"{flag} needs a file, such as {flag} smoke")
            out += ["--config", found(value)]
        else:
            out.append(flag + equals + value)
    return out


def config_diff(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves of two nested settings that differ: dotted name, before, after.

    A setting that the older of them does not know is no difference where it has the value that the code gives it.
    """
    for name in {**was, **now}:
        before, after = was.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from config_diff(before, after, f"{prefix}{name}.")
        elif before != after:
            setting = option_specs("fit").get(option_name(f"{prefix}{name}"))
            if name in was or setting is None or after != setting.default:
                yield f"{prefix}{name}", before, after
