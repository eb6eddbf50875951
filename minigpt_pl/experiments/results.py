"""What a run of a study leaves in its results folder, small enough to be committed, and how it is read again.

When runs are started is in `study`, what is made of their results in `report`.
"""

import csv
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from minigpt_pl.checkpoint.io import BEST_CKPT, read_checkpoint
from minigpt_pl.cli.options import config_diff, option_name
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.models.gpt import GPT, token_cross_entropy
from minigpt_pl.runtime.atomic_io import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, TEMP_SUFFIX
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.lit_modules import from_checkpoint

TOKEN_NLL_FILE, SAMPLE_FILE = "nats.npz", "sample.txt"
MAX_SCORED_TOKENS = 60_000
"""Scored tokens that are kept; of a larger validation part evenly spaced windows."""
MAX_EVAL_ROWS = 200
"""Checks that are kept, evenly spaced."""
SAMPLING = SamplingConfig(max_new_tokens=300, temperature=0.8)


@dataclass(frozen=True)
class TokenNLL:
    """Negative log-likelihoods of the validation part under one model, token by token in windows of a full check.

    Args:
        nats: Of each scored token (N,).
        lengths: Its characters (N,).
        begins: Where in the part the first target of each window stands, in characters (W,).
        window: Targets in a window; the last one may have fewer.
    """

    nats: NDArray[np.float16]
    lengths: NDArray[Any]
    begins: NDArray[np.int32]
    window: int

    def by_character(self) -> NDArray[np.float64]:
        """Nats of each character of the part, a token's shared among its own; nan where none was scored."""
        characters = np.add.reduceat(self.lengths, np.arange(0, len(self.nats), self.window))  # of each window
        before = np.cumsum(characters) - characters
        places = np.repeat(self.begins - before, characters) + np.arange(characters.sum())
        found = np.full(places.max() + 1, np.nan)
        found[places] = np.repeat(self.nats.astype(np.float64) / self.lengths, self.lengths)
        return found

    def by_position(self) -> NDArray[np.float64]:
        """Mean nats per character of the targets at each position of a window (window,)."""
        position = np.arange(len(self.nats)) % self.window
        return np.bincount(position, self.nats) / np.bincount(position, self.lengths)

    def sampling_error(self, windows: int) -> float:
        """What the mean of so many windows drawn at random would scatter by (SD), in nats per character."""
        whole = len(self.nats) // self.window * self.window  # the last window may be short
        nats, characters = (x[:whole].astype(np.float64).reshape(-1, self.window) for x in (self.nats, self.lengths))
        means = nats.sum(1) / characters.sum(1)
        return float(means.std(ddof=1) / np.sqrt(windows)) if len(means) > 1 else math.nan


@torch.inference_mode()
def score(model: GPT, data: TextDataModule) -> TokenNLL:
    """Scores the validation part as a full check does, at most MOST_TOKENS of it."""
    limit = max(1, min(data.max_eval_tokens, MAX_SCORED_TOKENS) // data.block_size)
    batches = data.eval_dataset("val", limit)
    ends = np.cumsum(data.tokenizer.token_lengths[data.tokens("val"), 0])
    nats, lengths = [], []
    for inputs, targets, _ in (batches[i] for i in range(len(batches))):
        scored = targets >= 0
        nats.append(token_cross_entropy(model(inputs)[0], targets)[scored].numpy())
        lengths.append(data.tokenizer.token_lengths[targets[scored].numpy(), 0])
    return TokenNLL(
        np.concatenate(nats).astype(np.float16),
        np.concatenate(lengths),
        ends[batches.starts].astype(np.int32),
        data.block_size,
    )


def datamodule_of(saved: dict[str, Any]) -> TextDataModule:
    """The text of a run, from its checkpoint.

    Raises:
        InputError: If it is gone or has changed.
    """
    settings = saved["settings"]
    data = TextDataModule(**settings["data"], block_size=settings["model"]["init_args"]["block_size"])
    data.load_state_dict({**saved["TextDataModule"], "step": saved["global_step"]})
    if Path(remembered := saved["TextDataModule"]["text_path"]).is_file():
        data.path = remembered
    return data


def write_result(run_dir: Path, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the results folder of a run that has ended, whole or not at all.

    Args:
        run_dir: Of the run.
        folder: To be made; its name is that of the run in its study.
        facts: What summary.json is to say beside the run's own.

    Raises:
        InputError: If the run has no best.ckpt, or its text is gone.
    """
    saved = read_checkpoint(run_dir / BEST_CKPT)
    model, data = from_checkpoint(saved).net, datamodule_of(saved)
    summary = json.loads((run_dir / SUMMARY_FILE).read_text("utf-8"))
    settings = strip_paths(summary.pop("config"))
    summary |= {"flops_per_token": model.flops_per_token(), **facts}
    scores = score(model, data)
    arrays: dict[str, Any] = {"nats": scores.nats, "begins": scores.begins}
    if data.tokenizer_kind != "char":
        arrays["lengths"] = scores.lengths.astype(np.min_scalar_type(scores.lengths.max()))
    ids = [token for (token,) in generate(model, data.tokenizer.encode_prompt(""), SAMPLING)]

    half = folder.with_name(f"{folder.name}{TEMP_SUFFIX}")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    (half / CONFIG_FILE).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "utf-8")
    (half / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    (half / METRICS_FILE).write_text(subsample_metrics((run_dir / METRICS_FILE).read_text("utf-8")), "utf-8")
    np.savez_compressed(half / TOKEN_NLL_FILE, **arrays)
    (half / SAMPLE_FILE).write_text(data.tokenizer.decode(ids) + "\n", "utf-8")
    os.replace(half, folder)


def subsample_metrics(metrics: str) -> str:
    """metrics.csv at the steps of checks alone, with six digits."""
    reader = csv.DictReader(io.StringIO(metrics))
    rows = list(reader)
    checks = list(dict.fromkeys(row["step"] for row in rows if row["split"] == "val"))
    count = min(len(checks), MAX_EVAL_ROWS)
    kept = {checks[round(place)] for place in np.linspace(0, len(checks) - 1, count)}
    out = io.StringIO()
    writer = csv.DictWriter(out, reader.fieldnames or [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        if row["step"] in kept:
            writer.writerow({name: round_number(value) for name, value in row.items()})
    return out.getvalue()


def round_number(value: str) -> str:
    """A number with six digits; what is none, or whole, as it is."""
    return f"{float(value):.6g}" if "." in value else value


def strip_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without a place on this machine: the text by its name, where it was given by its absolute path."""
    path = settings["data"]["path"]
    return settings | {"data": settings["data"] | {"path": Path(path).name if Path(path).is_absolute() else path}}


def strip_paths_in_text(text: str) -> str:
    """A command line, or several, in which files named by absolute paths are named by their last part."""
    return re.sub(r"(?<![^\s='\"])/\S*/", "", text)


def run_differences(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What makes two configurations different runs, a line each.

    W&B changes no run, and which text it is, its hash tells.
    """
    for full_name, before, after in config_diff(was, now):
        name = option_name(full_name)
        if not (name == "data.path" or name.startswith("wandb")):
            yield f"{name}: {before} -> {after}"


@dataclass(frozen=True)
class Result:
    """A results folder."""

    folder: Path

    @property
    def name(self) -> str:
        """Of the configuration."""
        return self.folder.name.rpartition("-")[0]

    @property
    def seed(self) -> int:
        return int(self.folder.name.rpartition("-")[2])

    @cached_property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / SUMMARY_FILE).read_text("utf-8"))
        return found

    @cached_property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((self.folder / CONFIG_FILE).read_text("utf-8"))
        return found

    @cached_property
    def scores(self) -> TokenNLL:
        with np.load(self.folder / TOKEN_NLL_FILE) as file:
            nats, begins = file["nats"], file["begins"]
            lengths = file["lengths"] if "lengths" in file else np.ones(len(nats), np.int64)
        return TokenNLL(nats, lengths.astype(np.int64), begins, self.settings["model"]["init_args"]["block_size"])

    @property
    def characters_a_token(self) -> float:
        """In the mean, over what was scored."""
        return float(self.scores.lengths.mean())

    @property
    def minutes(self) -> float:
        """Of training at the run's median speed, so without checks and pauses; by the clock where no speed is known."""
        speeds = self.figures("train").get("perf/tokens_per_s", np.empty(0))
        if not (known := speeds[~np.isnan(speeds)]).size:
            return float(self.summary["wall_seconds"]) / 60
        return float(self.summary["tokens_seen"] / np.median(known)) / 60

    @property
    def sample(self) -> str:
        return (self.folder / SAMPLE_FILE).read_text("utf-8").removesuffix("\n")

    def figures(self, part: str) -> dict[str, NDArray[np.float64]]:
        """The columns of metrics.csv in the rows of "train" or "val"; nan where a row has none."""
        with (self.folder / METRICS_FILE).open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == part]
        names = [name for name in (rows[0] if rows else {}) if name != "split"]
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}

    def scored_text(self) -> tuple[Any, ...]:
        """What a figure is a figure of: runs are compared only where this is equal."""
        data = self.settings["data"]
        ways = ("train_frac", "test_frac", "eval_mode", "max_eval_tokens")
        return (self.summary["data_sha256"], *(data[name] for name in ways))

    def batches(self) -> tuple[Any, ...]:
        """What decides, with the seed, which batches a run sees: runs are pairs only where this is equal."""
        settings, summary = self.settings, self.summary
        return (
            summary["data_sha256"],
            summary["tokenizer_sha256"],
            settings["data"]["train_frac"],
            settings["model"]["init_args"]["block_size"],
            settings["data"]["batch_size"],
            settings["data"].get("sampling", "random"),  # which older results do not name, nor
            settings["data"].get("token_noise", 0.0),
            settings["trainer"]["accumulate_grad_batches"],
        )


def read(folder: Path) -> list[Result]:
    """The results of a study, by configuration and seed.

    Raises:
        InputError: If there are none.
    """
    found = [Result(path) for path in (folder / "runs").glob("*-*") if (path / SUMMARY_FILE).is_file()]
    found = [result for result in found if not result.folder.name.endswith(TEMP_SUFFIX)]
    if not found:
        raise UserError(f"{folder} holds no results: run a study first, with --out {folder}")
    return sorted(found, key=lambda result: (result.name, result.seed))
