"""Draws docs/curve.svg, which README shows: the learning curve of a run beside the floors of its text.

`python docs/build/learning_curve.py runs/first`; README's table of checks is printed. Any run will do, if it ended with a summary.
"""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

from minigpt_pl.data.baselines import compute_baselines

PICTURE = Path(__file__).parents[2] / "docs" / "curve.svg"
STEPS = (100, 200, 400, 800, 1200, 1500)
TRAIN, VAL, FLOOR, INK = "#9db8d9", "#1f5fa8", "#b0762a", "#333333"
CLOSEST = 0.075  # nats between two labels, so that they do not cover each other


def rows_of(run: Path) -> dict[str, dict[int, dict[str, str]]]:
    """The rows of metrics.csv, by part and step."""
    found: dict[str, dict[int, dict[str, str]]] = {"train": {}, "val": {}}
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["split"]][int(row["step"])] = row
    return found


def apart(heights: dict[str, float]) -> dict[str, float]:
    """Where labels are to stand, each at its height or just far enough above the one below it."""
    placed: dict[str, float] = {}
    below = -math.inf
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        below = placed[name] = max(height, below + CLOSEST)
    return placed


def draw(run: Path, picture: Path) -> None:
    """Writes the picture, the same bytes for the same run."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    options: dict[str, Any] = {"svg.hashsalt": "minigpt", "svg.fonttype": "none", "font.size": 10}
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    data, rows, last = summary["config"]["data"], rows_of(run), summary["total_steps"]
    known = compute_baselines(data["path"], data["train_frac"], data["test_frac"])
    lines = {name: figures["nats_per_char"] for name, figures in known.items()}
    with pyplot.rc_context(options):
        figure, axes = pyplot.subplots(figsize=(8, 5))
        train = {step: float(row["train/loss"]) for step, row in rows["train"].items()}
        val = {step: float(row["val/nats_per_char"]) for step, row in rows["val"].items()}
        if data["tokenizer"] == "char":  # else it is in nats per token, another unit
            axes.plot(list(train), list(train.values()), color=TRAIN, linewidth=1, label="train/loss, dropout on")
        axes.plot(list(val), list(val.values()), color=VAL, marker="o", markersize=3.5, label="val/nats_per_char")
        for value in lines.values():
            axes.axhline(value, color=FLOOR, linewidth=0.8, linestyle=(0, (5, 3)))
        best = {f"this model {summary['best_nats_per_char']:.3f}": summary["best_nats_per_char"]}
        for label, height in apart({f"{name} {value:.3f}": value for name, value in lines.items()} | best).items():
            color = VAL if label in best else FLOOR
            axes.annotate(label, (last * 1.015, height), color=color, va="center", annotation_clip=False)
        axes.set_xlim(0, last)
        axes.set_ylim(min(lines["5-gram"], *val.values()) - 0.1, max(lines["unigram"], *val.values()) + 0.15)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("nats per character")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
        figure.subplots_adjust(left=0.08, right=0.83, top=0.97, bottom=0.11)
        figure.savefig(picture, metadata={"Date": None, "Title": "The learning curve and the floors of simple methods"})
        pyplot.close(figure)


def table(run: Path) -> str:
    """README's table of a run's checks."""
    rows = rows_of(run)
    parts = {"`train/loss`": ("train", "train/loss"), "`val/nats_per_char`": ("val", "val/nats_per_char")}
    lines = ["| step | " + " | ".join(map(str, STEPS)) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for title, (part, column) in parts.items():
        cells = [f"{float(rows[part][step][column]):.3f}" for step in STEPS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), PICTURE)
    print(table(Path(sys.argv[1])))
