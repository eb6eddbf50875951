"""What the page shows of a run: the files of its directory, also while it trains."""

import csv
import io
import json
import math
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from minigpt_pl.cli.options import flatten, option_name
from minigpt_pl.data.datamodule import datamodule_of
from minigpt_pl.page.texts import text_baselines
from minigpt_pl.runtime.atomic_io import CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.by_products import read_samples

MAX_ROWS = 600
MAX_DEPTH = 3
SUMMARY_RESULTS = {"parameters": "params_total", "tokens/s": "tokens_per_s"}


def find_runs(places: list[str]) -> list[Path]:
    """The run directories among `places` and below them.

    Raises:
        UserError: If a place has none.
    """
    found: list[Path] = []
    for place in map(Path, places):
        levels = ["/".join(["*"] * depth) for depth in range(1, MAX_DEPTH + 1)]
        below = [path for level in levels for path in sorted(place.glob(level)) if is_run(path)]
        here = [place] if is_run(place) else below
        if not here:
            problem = "it holds no run" if place.is_dir() else "there is no such directory"
            raise UserError(f"{place}: {problem}", remedy=f"name a directory with a {METRICS_FILE}")
        found += here
    return list(dict.fromkeys(found))


def is_run(path: Path) -> bool:
    return (path / METRICS_FILE).is_file() and (path / CONFIG_FILE).is_file()


def read_run(path: Path) -> dict[str, Any]:
    """A run in plain values: settings, results, metrics, samples. Files that are not there yet are left out.

    Raises:
        UserError: If config.yaml or metrics.csv cannot be read.
    """
    try:
        config = yaml.safe_load((path / CONFIG_FILE).read_text("utf-8"))
        settings = {option_name(name): value for name, value in flatten(config)}
        metrics = read_metrics((path / METRICS_FILE).read_text("utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path}: it cannot be read ({error})", remedy="leave it out") from None
    summary: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        summary = json.loads((path / SUMMARY_FILE).read_text("utf-8"))
    samples: list[tuple[int, str]] = []
    with suppress(OSError, ValueError):
        samples = read_samples(path / SAMPLES_FILE)
    return {
        "name": path.resolve().name,
        "tokenizer": settings.get("data.tokenizer"),
        "settings": settings,
        "results": results(metrics, summary),
        "metrics": {split: thin(table) for split, table in metrics.items()},
        "samples": samples,
        "baselines": baselines(json.dumps(config), summary.get("data_sha256")),
    }


def read_metrics(content: str) -> dict[str, dict[str, list[Any]]]:
    """Columns and rows of metrics.csv by split; the step stands first. An incomplete last line is left out."""
    complete = content[: content.rfind("\n") + 1]
    rows = list(csv.DictReader(io.StringIO(complete, newline="")))
    tables: dict[str, dict[str, list[Any]]] = {}
    for split in ("train", "val"):
        own = [row for row in rows if row["split"] == split]
        columns = ["step", *(name for name in (rows[0] if rows else ()) if name not in ("step", "split"))]
        columns = [name for name in columns if any(row[name] for row in own)]
        tables[split] = {"columns": columns, "rows": [[number(row[name]) for name in columns] for row in own]}
    return tables


def number(text: str | None) -> float | int | None:
    """A value of metrics.csv with six digits; JSON has no nan."""
    value = float(text or "nan")
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.6g}")


def thin(table: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """At most MAX_ROWS rows, evenly spaced, with the last one."""
    stride = max(1, math.ceil(len(table["rows"]) / MAX_ROWS))
    return {"columns": table["columns"], "rows": table["rows"][::-1][::stride][::-1]}


def results(metrics: dict[str, dict[str, list[Any]]], summary: dict[str, Any]) -> dict[str, Any]:
    steps = [row[0] for table in metrics.values() for row in table["rows"]]
    step = max(steps, default=0)
    ended = summary.get("total_steps", -1) >= step
    columns, rows = metrics["val"]["columns"], metrics["val"]["rows"]
    result: dict[str, Any] = {"state": summary.get("stop_reason") if ended else "not ended"}
    result["step"] = step
    if "val/loss" in columns:
        loss = columns.index("val/loss")
        best = min((row for row in rows if row[loss] is not None), key=lambda row: row[loss], default=None)
        if best is not None:
            nats = best[columns.index("val/nats_per_char")]
            result |= {"best val/loss": best[loss], "at step": best[0], "nats/char": nats}
    return result | {name: summary.get(key) for name, key in SUMMARY_RESULTS.items()}


@lru_cache(maxsize=64)
def baselines(config: str, text_sha256: str | None) -> dict[str, float] | None:
    """The baselines of a run's text, if it is still there and the same."""
    try:
        data = datamodule_of(json.loads(config))
        return text_baselines(data) if text_sha256 in (None, data.text_stats.sha256) else None
    except (UserError, KeyError, TypeError):
        return None
