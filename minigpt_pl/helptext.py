"""Between the user's words and the parser: what --help shows, which file is meant, what a mistake may have meant.

The options themselves are declared in `cli`.
"""

import argparse
import difflib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from minigpt_pl.errors import InputError
from minigpt_pl.modules import ClassicLM, LanguageModel, ModernLM

HELP = {  # the settings of the Trainer that --help shows, in our words; --trainer.help shows them all in Lightning's
    "trainer.accelerator": "cpu, mps, cuda, or auto.",
    "trainer.devices": "How many of them.",
    "trainer.strategy": "ddp for several devices.",
    "trainer.precision": "32-true or bf16-mixed, among others.",
    "trainer.max_steps": "Optimizer steps in all, those before a resume included.",
    "trainer.max_time": "Longest time to train, DD:HH:MM:SS.",
    "trainer.gradient_clip_val": "The largest norm of the gradient; null is no limit.",
    "trainer.accumulate_grad_batches": "Micro-batches in an optimizer step.",
    "trainer.log_every_n_steps": "Steps between logged training figures.",
    "trainer.callbacks": "More callbacks, by class.",
    "model": "ClassicLM or ModernLM; --model.help ModernLM lists its settings.",
    "ckpt_path": "The checkpoint to start from: last or best in --run_dir, or a file.",
    "data.block_size": argparse.SUPPRESS,
    "config": "Settings from a file, or a shipped one such as modern or journey/p2_refine.",
}
MODELS = {"ClassicLM": ClassicLM, "ModernLM": ModernLM}


class Help(DefaultHelpFormatter):
    """Help text with defaults in brackets."""

    def _get_help_string(self, action: argparse.Action) -> str:
        plain = isinstance(action.default, (str, int, float)) and action.default not in {"", argparse.SUPPRESS}
        return f"{action.help or ''}{' [%(default)s]' * plain}"


def quiet() -> None:
    """No advertisements, no roll call of devices, no advice that does not hold here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for advice in (
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*You're resuming from a checkpoint that ended.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*exists and is not empty.*",
        ".*smaller than the logging interval.*",
        ".*predict returned None.*",
        ".*Trying to infer the `batch_size`.*",
    ):
        warnings.filterwarnings("ignore", advice)


def shorten(parser: LightningArgumentParser) -> None:
    """Hides the rare options of the Trainer."""
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
        rare = action.dest.startswith("trainer.") and action.dest not in HELP and action.nargs != 0
        if rare or action.dest in {"weights_only", "return_predictions"}:
            action.help = argparse.SUPPRESS


def with_shipped_configs(options: list[str], configs: Path) -> list[str]:
    """The command line with each -c NAME that is no file replaced by the shipped file of that name."""

    def found(name: str) -> str:
        if Path(name).exists():
            return name
        for candidate in (configs / name, configs / f"{name}.yaml"):
            if candidate.is_file():
                return str(candidate)
        known = [str(path.relative_to(configs).with_suffix("")) for path in sorted(configs.rglob("*.yaml"))]
        near = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=1)
        raise InputError(f"-c {name}: there is no such file" + (f"; did you mean {near[0]}?" if near else ""))

    words, out = iter(options), []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("-c", "--config"):
            if not equals and (value := next(words, "")) == "":
                raise InputError(f"{flag} needs a file")
            out += [flag, found(value)]
        else:
            out.append(word)
    return out


def hint(message: str, parser: LightningArgumentParser) -> str:
    """What an unknown setting may have meant."""
    if not (unknown := re.search(r"(?:arguments: --|[Oo]ption ')([\w.]+)", message)):
        return ""
    names = {action.dest for action in parser._actions}
    for model in (LanguageModel, ClassicLM, ModernLM):
        names |= {f"model.{name}" for name in inspect.signature(model).parameters}
    short = unknown[1].removeprefix("model.").removeprefix("init_args.")
    for model in (ClassicLM, ModernLM):
        if short in inspect.signature(model).parameters:
            return f" ({model.__name__} has it: --model {model.__name__})"
    name = unknown[1] if "." in unknown[1] else f"{message.partition(':')[0]}.{unknown[1]}"
    close = difflib.get_close_matches(name.replace("init_args.", ""), names, n=1, cutoff=0.7)
    return f" (did you mean --{close[0]}?)" if close else ""


def model_class(path: str) -> type[LanguageModel]:
    return MODELS[path.rpartition(".")[2]]


def differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves of two nested settings that differ: dotted name, before, after."""
    for name in {**was, **now}:
        before, after = was.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after


def prompts(prompt: str, file: str) -> list[str]:
    """What predict continues: one prompt, or those of a file, one a line."""
    if not file:
        return [prompt]
    if prompt:
        raise InputError("--sample.prompt and --sample.prompt_file are both given: give one")
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sample.prompt_file {file} cannot be read: {error}") from None
    if not lines:
        raise InputError(f"sample.prompt_file {file} is empty: give one prompt a line")
    return lines
