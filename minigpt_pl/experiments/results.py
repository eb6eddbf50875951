"""The results of a study: measured once for each finished run, and stored in a few small files that can be committed.

`runs.jsonl` has a line for each run (its configuration, summary and a sample of its text), `metrics.csv` has the
learning curves of all runs, and `token_nll.npz` the losses of the single tokens. Runs are executed in `runner`; what
the results say is computed in `analysis`.

The token losses would be nearly all of the bytes. Only their sum over the seeds of a variant is stored, since a report
needs means over seeds of each character and each position, and the losses of one more seed can be added to a sum. They
are rounded, so that the file compresses well: a report prints four digits of means over thousands of tokens. The one
number that needs the losses of a single seed, the standard deviation over its windows, stands in the summary of the run
(`window_sd`).
"""

import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from minigpt_pl.checkpoint.io import BEST_CKPT, read_checkpoint, with_newer_options
from minigpt_pl.cli.options import config_diff, option_name
from minigpt_pl.data.datamodule import TextDataModule, datamodule_of
from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.models.gpt import GPT, token_cross_entropy
from minigpt_pl.runtime.atomic_io import METRICS_FILE, SUMMARY_FILE, atomic_write
from minigpt_pl.training.lit_modules import from_checkpoint

RUNS_FILE, TOKEN_NLL_FILE = "runs.jsonl", "token_nll.npz"
MAX_SCORED_TOKENS = 60_000  # a larger validation split is scored in evenly spaced windows
NATS_STEP = 1 / 1024  # stored token losses are multiples of it: their sums over seeds are exact
MAX_STORED_EVALS = 200
MAX_RANDOM_WINDOWS = 4096  # of a split with more of them, that many are read for `expected_estimate`, evenly spaced
LOGGERS = ("wandb", "tensorboard")  # options that do not make a run another one
SAMPLING = SamplingConfig(max_new_tokens=300, temperature=0.8)


@dataclass(frozen=True)
class TokenNLL:
    """Negative log-likelihoods of the tokens of the validation split, in the windows of a full evaluation.

    Args:
        total: Nats of each scored token (N,), summed over seeds.
        seeds: The seeds in that sum (S,).
        lengths: Characters of each token (N,).
        starts: Offset of the first target of each window (W,), in characters from the start of the split.
        window: Targets in a window; the last window may have fewer.
    """

    total: NDArray[np.float32]
    seeds: NDArray[Any]
    lengths: NDArray[Any]
    starts: NDArray[Any]
    window: int

    def __add__(self, other: "TokenNLL") -> "TokenNLL":
        """The sum over the seeds of both. A seed that is already in the sum is not added again."""
        if np.isin(other.seeds, self.seeds).any():
            return self
        assert np.array_equal(self.lengths, other.lengths), "the seeds of a variant score the same tokens"
        return replace(self, total=self.total + other.total, seeds=np.append(self.seeds, other.seeds))

    @property
    def mean(self) -> NDArray[np.float64]:
        """Nats of each token (N,), the mean over seeds."""
        return self.total.astype(np.float64) / len(self.seeds)

    @property
    def chars_per_token(self) -> float:
        return float(self.lengths.mean())

    def by_character(self) -> NDArray[np.float64]:
        """Nats of each character of the split; a token's are shared equally by its characters; nan if not scored."""
        lengths = self.lengths.astype(np.int64)
        in_window = np.add.reduceat(lengths, np.arange(0, len(lengths), self.window))  # characters (W,)
        before = np.cumsum(in_window) - in_window
        offsets = np.repeat(self.starts - before, in_window) + np.arange(in_window.sum())
        values = np.full(offsets.max() + 1, np.nan)
        values[offsets] = np.repeat(self.mean / lengths, lengths)
        return values

    def by_position(self) -> NDArray[np.float64]:
        """Mean nats per character of the targets at each position of a window (window,)."""
        position = np.arange(len(self.total)) % self.window
        return np.bincount(position, self.mean) / np.bincount(position, self.lengths)

    def window_sd(self) -> float | None:
        """Standard deviation over windows of their nats per character; None with fewer than two full windows."""
        full = len(self.total) // self.window * self.window
        nats, characters = (
            x[:full].astype(np.float64).reshape(-1, self.window).sum(1) for x in (self.mean, self.lengths)
        )
        return float((nats / characters).std(ddof=1)) if len(nats) > 1 else None


@dataclass(frozen=True)
class Result:
    """One run: a line of runs.jsonl, and its rows of metrics.csv."""

    name: str  # of the variant
    seed: int
    command: str
    machine: str
    config: dict[str, Any]
    summary: dict[str, Any]
    sample: str  # text that the best model writes
    rows: list[dict[str, str]] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.name}-{self.seed}"

    @property
    def minutes(self) -> float:
        """Training time at the median speed, without evaluations and pauses; wall time if no speed was logged."""
        speeds = self.metrics("train").get("perf/tokens_per_s")
        if speeds is None:
            return float(self.summary["wall_seconds"]) / 60
        return float(self.summary["tokens_seen"] / np.nanmedian(speeds)) / 60

    def metrics(self, split: str) -> dict[str, NDArray[np.float64]]:
        """The metrics of "train" or "val", a value for each row; nan where a row has none."""
        rows = [row for row in self.rows if row["split"] == split]
        names = dict.fromkeys(name for row in rows for name in row if name != "split")
        return {name: np.array([float(row.get(name, "nan")) for row in rows]) for name in names}

    @property
    def split_basis(self) -> str:
        """The function's value for this run."""
        return split_basis(self.config["data"], self.summary["tokenizer_sha256"])

    def eval_protocol(self) -> tuple[Any, ...]:
        """What a loss is measured on: losses can be compared only if this is equal.

        Runs with eval_mode sampled and both compare: the same estimator chooses their best evaluation.
        """
        data, limit = self.config["data"], self.config["trainer"].get("limit_val_batches")
        estimator = ("full", data["max_eval_tokens"]) if data["eval_mode"] == "full" else ("sampled",)
        return *self.text_protocol(), limit, *estimator

    def text_protocol(self) -> tuple[Any, ...]:
        """Which characters the validation split has; the first item is the hash of the whole text."""
        data = self.config["data"]
        return self.summary["data_sha256"], self.split_basis, data["train_frac"], data["test_frac"]

    def batch_protocol(self) -> tuple[Any, ...]:
        """What determines, with the seed, the batches of a run: equal seeds are pairs only if this is equal."""
        data = {"sampling": "random", "token_noise": 0.0} | self.config["data"]  # older results lack these two
        names = ("train_frac", "batch_size", "sampling", "token_noise")
        tokens = self.summary["data_sha256"], self.summary["tokenizer_sha256"], self.split_basis
        model, trainer = self.config["model"]["init_args"], self.config["trainer"]
        return *tokens, model["block_size"], trainer["accumulate_grad_batches"], *(data[name] for name in names)


def split_basis(data: dict[str, Any], tokenizer_sha256: str) -> str:
    """What the shares of the splits count: "characters", or the tokens of the tokenizer with this hash."""
    by_tokens = data["tokenizer"] != "char" and data.get("split_unit") == "tokens"  # older results lack it
    return tokenizer_sha256 if by_tokens else "characters"


# Measuring a run that has ended.


def measure(run_dir: Path, name: str, seed: int, command: str, machine: str) -> tuple[Result, TokenNLL]:
    """Evaluates the best checkpoint of a run; UserError if there is none, or its text has changed or is gone."""
    net, data = load_best(run_dir)
    summary = json.loads((run_dir / SUMMARY_FILE).read_text("utf-8"))
    config = json.loads(strip_paths(json.dumps(summary.pop("config"))))
    nll = score(net, data, seed)
    summary |= {"flops_per_token": net.flops_per_token(), "window_sd": nll.window_sd()}
    if data.config.eval_mode != "full":
        summary["expected_estimate"] = expected_estimate(net, data)
    tokens = [token for (token,) in generate(net, data.tokenizer.encode_prompt(""), SAMPLING)]
    sample, rows = data.tokenizer.decode(tokens), subsample_metrics((run_dir / METRICS_FILE).read_text("utf-8"))
    return Result(name, seed, strip_paths(command), machine, config, summary, sample, rows), nll


def load_best(run_dir: Path) -> tuple[GPT, TextDataModule]:
    """The best model of a run, and its text; UserError if there is none, or the text has changed or is gone."""
    checkpoint = read_checkpoint(run_dir / BEST_CKPT)
    data, state = datamodule_of(checkpoint["config"]), checkpoint["TextDataModule"]
    data.load_state_dict(state)  # its tokenizer, and the hash of its text
    if Path(state["text_path"]).is_file():
        data.path = state["text_path"]  # the run's relative path may be relative to another directory
    return from_checkpoint(checkpoint).net, data


@torch.inference_mode()
def score(net: GPT, data: TextDataModule, seed: int) -> TokenNLL:
    """Scores the validation split as a full evaluation does, up to MAX_SCORED_TOKENS."""
    limit = max(1, min(data.config.max_eval_tokens, MAX_SCORED_TOKENS) // data.config.block_size)
    batches = data.eval_dataset("val", limit)
    ends = np.cumsum(data.tokenizer.token_lengths[data.tokens("val"), 0])
    nats, lengths = [], []
    for inputs, targets, _ in (batches[i] for i in range(len(batches))):
        scored = targets >= 0
        nats.append(token_cross_entropy(net(inputs)[0], targets)[scored].float().numpy())
        lengths.append(data.tokenizer.token_lengths[targets[scored].numpy(), 0])
    tokens = np.concatenate(lengths)
    starts = ends[batches.starts].astype(np.int32)
    compact = tokens.astype(np.min_scalar_type(tokens.max()))
    return TokenNLL(np.concatenate(nats), np.array([seed]), compact, starts, data.config.block_size)


@torch.inference_mode()
def expected_estimate(net: GPT, data: TextDataModule) -> float:
    """Nats per token that a sampled evaluation of the validation split gives on average: of all its windows."""
    windows, size = data.eval_dataset("val"), data.config.block_size
    choices = windows.segments.choices(size)
    count = min(choices, MAX_RANDOM_WINDOWS)
    windows = replace(windows, starts=windows.segments.window_starts(size, np.arange(count) * choices // count))
    batches = (windows[i] for i in range(len(windows)))
    return sum(token_cross_entropy(net(x)[0], y).double().sum().item() for x, y, _ in batches) / (count * size)


def subsample_metrics(metrics: str) -> list[dict[str, str]]:
    """The rows of metrics.csv at (at most MAX_STORED_EVALS) steps with an evaluation, with six digits."""
    rows = list(csv.DictReader(io.StringIO(metrics)))
    steps = list(dict.fromkeys(row["step"] for row in rows if row["split"] == "val"))
    stride = max(1, math.ceil(len(steps) / MAX_STORED_EVALS))
    selected = set(steps[::-stride])  # with the last one
    return [
        {name: f"{float(value):.6g}" if "." in value else value for name, value in row.items() if value}
        for row in rows
        if row["step"] in selected
    ]


def strip_paths(text: str) -> str:
    """Text in which each absolute path is replaced by its file name: results name no directories of this machine."""
    return re.sub(r"(?<![^\s='\"])/\S*/", "", text)


def run_differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """The options that make two configurations different runs, a line each; loggers and the text's path do not."""
    for full_name, old, new in config_diff(with_newer_options(before), now):
        name = option_name(full_name)
        if not (name == "data.path" or name.startswith(LOGGERS)):
            yield f"{name}: {old} -> {new}"


# The files of a study.


def read_results(folder: Path) -> list[Result]:
    """The results in a folder, by variant and seed; [] if there are none."""
    if not (folder / RUNS_FILE).is_file():
        return []
    rows: dict[tuple[str, int], list[dict[str, str]]] = defaultdict(list)
    with (folder / METRICS_FILE).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row.pop("name"), int(row.pop("seed"))].append({name: value for name, value in row.items() if value})
    runs = [json.loads(line) for line in (folder / RUNS_FILE).read_text("utf-8").splitlines()]
    return [Result(**run, rows=rows[run["name"], run["seed"]]) for run in runs]


def read_token_nll(folder: Path) -> dict[str, TokenNLL]:
    """The token losses of each variant; {} if there are none."""
    if not (folder / TOKEN_NLL_FILE).is_file():
        return {}
    parts = [part.name for part in fields(TokenNLL)]
    with np.load(folder / TOKEN_NLL_FILE) as file:
        names = {key.rpartition("/")[0] for key in file}
        return {name: TokenNLL(*(file[f"{name}/{part}"][()] for part in parts)) for name in names}  # [()]: a number


def add_result(folder: Path, result: Result, nll: TokenNLL) -> None:
    """Stores a run, in place of an earlier result of the same run."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # another study command may write here too
        losses = read_token_nll(folder)
        nll = replace(nll, total=np.round(nll.total / NATS_STEP) * np.float32(NATS_STEP))
        losses[result.name] = losses[result.name] + nll if result.name in losses else nll
        write_files(folder, [*(one for one in read_results(folder) if str(one) != str(result)), result], losses)


def write_files(folder: Path, results: list[Result], losses: dict[str, TokenNLL]) -> None:
    """Writes all three files. runs.jsonl is the last: a run without a line there counts as not done."""
    file = io.BytesIO()
    np.savez_compressed(
        file, **{f"{k}/{part.name}": getattr(v, part.name) for k, v in losses.items() for part in fields(v)}
    )
    atomic_write(folder / TOKEN_NLL_FILE, file.getvalue())
    results = sorted(results, key=lambda result: (result.name, result.seed))
    rows = [{"name": result.name, "seed": result.seed, **row} for result in results for row in result.rows]
    table = io.StringIO()
    writer = csv.DictWriter(table, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(folder / METRICS_FILE, table.getvalue().encode())
    lines = (json.dumps({k: v for k, v in vars(result).items() if k != "rows"}) for result in results)
    atomic_write(folder / RUNS_FILE, "".join(f"{line}\n" for line in lines).encode())
