"""Draws docs/curve.svg, the plot in README: a run's learning curve beside the baselines of its text.

`python docs/build/learning_curve.py runs/first` writes the plot. It takes any run that has a summary.json.
"""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

from minigpt_pl.data.baselines import compute_baselines

CURVE = Path(__file__).parents[1] / "curve.svg"
TRAIN, VAL, BASELINE = "#9db8d9", "#1f5fa8", "#b0762a"
MIN_LABEL_DISTANCE = 0.075  # in nats, so that labels do not overlap


def read_metrics(run: Path) -> dict[str, dict[int, dict[str, str]]]:
    """The rows of metrics.csv by split and step."""
    rows: dict[str, dict[int, dict[str, str]]] = {"train": {}, "val": {}}
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row["split"]][int(row["step"])] = row
    return rows


def label_positions(heights: dict[str, float]) -> dict[str, float]:
    """The position of each label: its own height, or just far enough above the label below it."""
    positions: dict[str, float] = {}
    below = -math.inf
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        below = positions[name] = max(height, below + MIN_LABEL_DISTANCE)
    return positions


def draw(run: Path, path: Path) -> None:
    """Writes the plot. The same run gives the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    options: dict[str, Any] = {"svg.hashsalt": "minigpt", "svg.fonttype": "none", "font.size": 10}
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    data, rows, last, best = summary["config"]["data"], read_metrics(run), summary["total_steps"], "this model"
    metrics = compute_baselines(data["path"], data["train_frac"], data["test_frac"])
    baselines = {name: values["nats_per_char"] for name, values in metrics.items()}
    with pyplot.rc_context(options):
        figure, axes = pyplot.subplots(figsize=(8, 5))
        val = {step: float(row["val/nats_per_char"]) for step, row in rows["val"].items()}
        if data["tokenizer"] == "char":  # with bpe train/loss is in nats per token, another unit
            train = {step: float(row["train/loss"]) for step, row in rows["train"].items()}
            axes.plot(list(train), list(train.values()), color=TRAIN, linewidth=1, label="train/loss, dropout on")
        axes.plot(list(val), list(val.values()), color=VAL, marker="o", markersize=3.5, label="val/nats_per_char")
        for value in baselines.values():
            axes.axhline(value, color=BASELINE, linewidth=0.8, linestyle=(0, (5, 3)))
        labels = baselines | {best: summary["best_nats_per_char"]}
        for name, height in label_positions(labels).items():
            color, position = VAL if name == best else BASELINE, (last * 1.015, height)
            axes.annotate(f"{name} {labels[name]:.3f}", position, color=color, va="center", annotation_clip=False)
        axes.set_xlim(0, last)
        axes.set_ylim(min(baselines["5-gram"], *val.values()) - 0.1, max(baselines["unigram"], *val.values()) + 0.15)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("nats per character")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
        figure.subplots_adjust(left=0.08, right=0.83, top=0.97, bottom=0.11)
        figure.savefig(path, metadata={"Date": None, "Title": "Learning curve and baselines"})
        pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), CURVE)
