"""The pictures of a report: learning curves, differences, expert load, loss by position.

What they show is computed in `findings`; here it is only drawn.
"""

from collections.abc import Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from minigpt_pl.experiments.analysis import StudyAnalysis
from minigpt_pl.experiments.results import Result

WIDTH, HEIGHT = 9.0, 5.0  # inches
STYLES = [f"C{n % 10}{'-' if n < 10 else '--'}" for n in range(20)]
GRID = 200
"""Points of a curve that is the mean of several."""
MAX_HEIGHT = 1.2
"""Nats per character above the lowest that the learning curves show."""
BINS = 16
"""Of positions, growing with them."""
LOAD = "moe/load_"
"""What columns of metrics.csv begin with: then follow the layer and the expert, or which of them it is."""


def draw_plots(report: StudyAnalysis) -> Iterator[str]:
    """Draws each picture that the results have something for, as PNG in the results folder; yields their names.

    One that they have nothing for any more goes.
    """
    for name, picture in (
        ("curves.png", plot_curves), ("differences.png", plot_differences), ("experts.png", plot_experts), ("positions.png", plot_positions)
    ):  # fmt: skip
        figure = Figure((WIDTH, HEIGHT), layout="constrained")
        if picture(report, figure):
            FigureCanvasAgg(figure).print_png(str(Path(report.folder, name)), metadata={"Software": None})
            yield name
        else:
            Path(report.folder, name).unlink(missing_ok=True)


def curve(result: Result) -> tuple[Any, Any]:
    """Characters trained on, and nats per character, at each check of a run."""
    figures, summary = result.figures("val"), result.summary
    a_step = summary["tokens_seen"] / summary["total_steps"] * result.characters_a_token
    return figures["step"] * a_step, figures["val/nats_per_char"]


def plot_curves(report: StudyAnalysis, figure: Figure) -> bool:
    """Of the seeds that are still training there."""
    axes = figure.add_subplot()
    lowest, highest = [], []
    for style, group in zip(cycle(STYLES), report.ranked(), strict=False):
        runs = [run for run in map(curve, group.results) if len(run[0]) > 1]
        if not runs:
            continue
        grid = np.geomspace(max(x[0] for x, _ in runs), max(x[-1] for x, _ in runs), GRID)
        grid[-1] = max(x[-1] for x, _ in runs)  # of which rounding has left a bit
        values = np.array([np.interp(grid, x, y, right=np.nan) for x, y in runs])
        axes.plot(grid, np.nanmean(values, 0), style, label=f"{group.name} ({len(runs)})", linewidth=1.2)
        low, high = np.nanmin(values, 0), np.nanmax(values, 0)
        axes.fill_between(grid, low, high, color=style[:2], alpha=0.25, linewidth=0)
        lowest.append(low.min())
        highest.append(high.max())
    if not lowest:
        return False
    axes.set_xscale("log")
    bottom, top = min(lowest) - 0.05, min(max(highest), min(lowest) + MAX_HEIGHT) + 0.05
    for name, found in report.baselines.items():
        if bottom < found["nats_per_char"] < top:
            axes.axhline(found["nats_per_char"], color="0.6", linewidth=0.8, linestyle=":")
            axes.text(axes.get_xlim()[1], found["nats_per_char"], f" {name}", va="center", fontsize=7, color="0.4")
    axes.set_ylim(bottom, top)
    label_axes(axes, "characters trained on", "nats/char, validation part", "Mean, and lowest to highest seed")
    axes.legend(fontsize=8)
    return True


def plot_differences(report: StudyAnalysis, figure: Figure) -> bool:
    found = [one for one in report.comparisons if one.over_seeds.interval is not None]
    if not found:
        return False
    axes, used = figure.add_subplot(), set()
    for place, one in enumerate(found):
        for shift, interval, color in (
            (-0.12, one.over_seeds.interval, "C0" if one.over_seeds.has_enough else "0.6"),
            (0.12, one.over_text, "C1"),
        ):
            if interval is not None:
                used.add(color)
                ends = [[interval.mean - interval.low], [interval.high - interval.mean]]
                axes.errorbar(
                    [interval.mean], [place + shift], xerr=ends, fmt="o", color=color, capsize=3, markersize=4
                )
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(found)), [f"{one.name}\n{one.verdict}" for one in found], fontsize=8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    label_axes(axes, "nats/char: left of 0 the first of the two is lower", "", "Named differences, 95 % intervals")
    shown = {"C0": "over seeds", "0.6": "over seeds, too few", "C1": "over text"}
    for color in [color for color in shown if color in used]:
        axes.plot([], [], "o-", color=color, label=shown[color], markersize=4)
    axes.legend(fontsize=8)
    return True


def plot_experts(report: StudyAnalysis, figure: Figure) -> bool:
    """The load of each expert (of many: of the most and least loaded) at each check of the first seed, a row each."""
    results = [group.results[0] for group in report.ranked() if group.has_experts]
    shown = [(result, figures) for result in results if (figures := result.figures("train"))]  # a short run logs none
    panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
    for axes, (result, figures) in zip(panels, shown, strict=False):
        loads = {name.removeprefix(LOAD): values for name, values in figures.items() if name.startswith(LOAD)}
        layers = [name.split("_")[0] for name in loads]
        shares = np.array([*loads.values()]) * result.settings["model"]["init_args"]["n_experts"]
        colors = axes.pcolormesh(
            figures["step"], range(len(layers)), shares, cmap="RdBu_r", vmin=0, vmax=2, shading="nearest"
        )
        begins = [layers.index(layer) for layer in dict.fromkeys(layers)]
        axes.hlines([begin - 0.5 for begin in begins[1:]], *axes.get_xlim(), color="0.2", linewidth=0.8)
        axes.set_yticks(begins, [layers[begin] for begin in begins])
        axes.invert_yaxis()
        label_axes(axes, "step", "layer", result.folder.name)
        axes.title.set_fontsize(8)
    if shown:
        bar = figure.colorbar(colors, ax=panels, extend="max")
        bar.set_label("tokens, in units of an equal share", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        figure.suptitle("Load of the experts of each layer, a row each", fontsize=10)
    return bool(shown)


def plot_positions(report: StudyAnalysis, figure: Figure) -> bool:
    axes = figure.add_subplot()
    for style, group in zip(cycle(STYLES), report.ranked(), strict=False):
        values = np.mean([result.scores.by_position() for result in group.results], axis=0)
        bins = np.unique(np.geomspace(1, len(values) + 1, BINS).round().astype(int))  # the later ones are all alike
        means = [values[begin - 1 : end - 1].mean() for begin, end in pairwise(bins)]
        length = np.mean([result.characters_a_token for result in group.results])
        axes.plot(bins[:-1] * length, means, style, marker=".", label=group.name, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    label_axes(axes, "characters of context", "nats/char", "Loss by position in the window, mean over seeds")
    axes.legend(fontsize=8)
    return True


def label_axes(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
