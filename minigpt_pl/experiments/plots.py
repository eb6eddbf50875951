"""The plots of a report: learning curves, differences, expert load, and loss by position.

The numbers are computed in `analysis`.
"""

from collections.abc import Iterator
from itertools import cycle, pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from PIL import Image

from minigpt_pl.experiments.analysis import StudyAnalysis

STYLE: Any = {
    "figure.figsize": (9.0, 5.0), "font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8,  # inches, points
    "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
COLORS = 96  # in a file: a quarter of the bytes of one that stores every shade
LINES = [f"C{n % 10}{'-' if n < 10 else '--'}" for n in range(20)]
GRID = 200  # points of a mean curve
MAX_HEIGHT = 1.2  # nats per character that the learning curves show above the lowest value
POSITION_BINS = 16
LOAD = "moe/load_"  # columns of expert load; the layer and the expert (or "max", "min") follow


def draw_plots(study: StudyAnalysis) -> Iterator[str]:
    """Draws each plot that has data into the results folder; yields their names. Outdated plots are removed."""
    for plot in (plot_curves, plot_differences, plot_experts, plot_positions):
        path = study.folder / f"{plot.__name__.removeprefix('plot_')}.png"
        with rc_context(STYLE):
            figure = Figure(layout="constrained")
            if plot(study, figure):
                canvas = FigureCanvasAgg(figure)
                canvas.draw()
                image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
                image.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
                yield path.name
            else:
                path.unlink(missing_ok=True)


def plot_curves(study: StudyAnalysis, figure: Figure) -> bool:
    """Loss over characters trained on: at each point the mean of the seeds that still train there."""
    axes = figure.add_subplot()
    lows, highs = [], []
    for line, group in zip(cycle(LINES), study.ranked(), strict=False):
        curves: list[tuple[Any, Any]] = []
        for result in group.results:
            metrics, summary = result.metrics("val"), result.summary
            if len(metrics.get("step", ())) > 1:
                per_step = summary["tokens_seen"] / summary["total_steps"] * group.token_nll.chars_per_token
                curves.append((metrics["step"] * per_step, metrics["val/nats_per_char"]))
        if not curves:
            continue
        end = max(x[-1] for x, _ in curves)
        grid = np.geomspace(max(x[0] for x, _ in curves), end, GRID)
        grid[-1] = end  # without the rounding error of geomspace
        values = np.array([np.interp(grid, x, y, right=np.nan) for x, y in curves])  # (seeds, GRID)
        low, high = np.nanmin(values, 0), np.nanmax(values, 0)
        axes.plot(grid, np.nanmean(values, 0), line, label=f"{group.name} ({len(curves)})", linewidth=1.2)
        axes.fill_between(grid, low, high, color=line[:2], alpha=0.25, linewidth=0)
        lows.append(low.min())
        highs.append(high.max())
    if not lows:
        return False
    bottom, top = min(lows) - 0.05, min(max(highs), min(lows) + MAX_HEIGHT) + 0.05
    for name, baseline in study.baselines.items():
        if bottom < (height := baseline["nats_per_char"]) < top:
            axes.axhline(height, color="0.6", linewidth=0.8, linestyle=":")
            axes.annotate(f" {name}", (1, height), xycoords=("axes fraction", "data"), va="center", fontsize=7)
    axes.set(xscale="log", ylim=(bottom, top), title="Mean, and lowest to highest seed")
    axes.set(xlabel="characters trained on", ylabel="nats/char, validation split")
    axes.legend()
    return True


def plot_differences(study: StudyAnalysis, figure: Figure) -> bool:
    """The named differences with both of their intervals."""
    shown = [one for one in study.comparisons if one.test.interval is not None]
    if not shown:
        return False
    axes, labels = figure.add_subplot(), set[str]()
    for y, one in enumerate(shown):
        seeds = ("over seeds", "C0") if one.test.has_enough else ("over seeds, too few", "0.6")
        for shift, interval, (label, color) in (
            (-0.12, one.test.interval, seeds),
            (0.12, one.over_text, ("over text", "C1")),
        ):
            if interval is not None:
                mean, low, high = interval
                axes.errorbar(
                    [mean], [y + shift], xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, markersize=4,
                    color=color, label=None if label in labels else label,
                )  # fmt: skip
                labels.add(label)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [f"{one.name}\n{one.conclusion}" for one in shown])
    axes.set(ylim=(len(shown) - 0.5, -0.5), title="Named differences, 95 % intervals")
    axes.set_xlabel("nats/char: left of 0 the first variant is lower")
    axes.legend()
    return True


def plot_experts(study: StudyAnalysis, figure: Figure) -> bool:
    """The load of each expert (of many: the highest and lowest) over the first seed's training, a row each."""
    firsts = [group.results[0] for group in study.ranked() if group.has_experts]
    shown = [(result, metrics) for result in firsts if (metrics := result.metrics("train"))]  # short runs log none
    panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
    for axes, (result, metrics) in zip(panels, shown, strict=False):
        loads = {name.removeprefix(LOAD): values for name, values in metrics.items() if name.startswith(LOAD)}
        layers = [name.split("_")[0] for name in loads]
        shares = np.array([*loads.values()]) * result.config["model"]["init_args"]["n_experts"]  # (rows, evaluations)
        rows = range(len(layers))
        colors = axes.pcolormesh(metrics["step"], rows, shares, cmap="RdBu_r", vmin=0, vmax=2, shading="nearest")
        starts = [layers.index(layer) for layer in dict.fromkeys(layers)]
        axes.hlines([start - 0.5 for start in starts[1:]], *axes.get_xlim(), color="0.2", linewidth=0.8)
        axes.set_yticks(starts, [layers[start] for start in starts])
        axes.invert_yaxis()
        axes.set(xlabel="step", ylabel="layer")
        axes.set_title(str(result), fontsize=8)
    if shown:
        figure.colorbar(colors, ax=panels, extend="max").set_label("share of the tokens, relative to an equal share")
        figure.suptitle("Load of the experts of each layer, a row each", fontsize=10)
    return bool(shown)


def plot_positions(study: StudyAnalysis, figure: Figure) -> bool:
    """Loss by position in the window."""
    axes = figure.add_subplot()
    for line, group in zip(cycle(LINES), study.ranked(), strict=False):
        values = group.token_nll.by_position()
        bins = np.unique(np.geomspace(1, len(values) + 1, POSITION_BINS).round().astype(int))
        means = [values[start - 1 : end - 1].mean() for start, end in pairwise(bins)]
        axes.plot(bins[:-1] * group.token_nll.chars_per_token, means, line, marker=".", label=group.name, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set(
        xlabel="characters of context", ylabel="nats/char", title="Loss by position in the window, mean over seeds"
    )
    axes.legend()
    return True
