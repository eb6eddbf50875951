"""The reference report's eleven runs beside ours, in README, docs/report.svg, docs/conclusions.md and docs/journey.md.

`python docs/build/report_table.py` reads docs/results/report, writes the picture and prints the tables. They compare
by the report's estimator, the lowest of a run's estimates, in nats per token; differences are in nats per character.
"""

from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minigpt_pl.experiments.analysis import Comparison, StudyAnalysis, VariantResults, difference_by_character
from minigpt_pl.experiments.report import COMPARISONS
from minigpt_pl.experiments.results import Result
from minigpt_pl.experiments.statistics import LEVEL, MIN_SEEDS_INTERVAL, Values, mean_ci
from minigpt_pl.experiments.tables import Columns, format_interval, render_table

DOCS = Path(__file__).parents[1]
RESULTS, PICTURE = DOCS / "results" / "report", DOCS / "report.svg"
OURS, EXACT, THEIRS = "#1f5fa8", "#9db8d9", "#b0762a"


class Row(NamedTuple):
    """A run of the report: its rank, lowest estimate and the step of it, where the report or its log gives that."""

    rank: int
    run: str
    best_val: float
    best_step: int | None
    ours: VariantResults | None = None

    def values(self, name: str) -> list[float]:
        """A number of the summaries, for each seed."""
        return [result.summary[name] for result in self.ours.results] if self.ours else []

    @property
    def has_interval(self) -> bool:
        return len(self.values("best_val")) >= MIN_SEEDS_INTERVAL


REPORT = (
    Row(1, "modern_moe_char_02", 1.8729, 1900),
    Row(2, "modern_moe_char_01", 1.8731, None),
    Row(3, "modern_moe_tuned", 1.8748, None),
    Row(4, "modern_moe", 1.8848, None),
    Row(5, "modern_dense", 1.8943, None),
    Row(6, "modern_dense_control", 1.8966, None),
    Row(7, "p2_refine", 1.9873, 3200),
    Row(8, "classic_tuned", 1.9876, 3000),
    Row(9, "classic_baseline", 2.0051, 2400),
    Row(10, "bpe_improved", 3.0743, None),
    Row(11, "bpe_test", 4.4599, None),
)


def next_seed(values: list[float]) -> tuple[float, float]:
    """Where one more seed is expected: the interval of a t prediction (Hahn & Meeker, Statistical Intervals, 4.7)."""
    interval, _ = mean_ci(values)
    half = float(interval.high - interval.mean) * np.sqrt(len(values) + 1)
    return float(interval.mean) - half, float(interval.mean) + half


def inside(row: Row) -> str:
    """Whether the report's value is where one more of our seeds is expected."""
    if not row.has_interval:
        return "too few seeds" if row.ours else "not run yet"
    low, high = next_seed(row.values("best_val"))
    return "yes" if low <= row.best_val <= high else f"no, {'below' if row.best_val < low else 'above'}"


def mean(row: Row, name: str, digits: int = 4) -> str:
    return f"{np.mean(row.values(name)):.{digits}f}" if row.ours else ""


COLUMNS: Columns = {
    "rank": lambda row: row.rank,
    "run": lambda row: f"`{row.run}`",
    "report": lambda row: f"{row.best_val:.4f}",
    "step": lambda row: row.best_step or "",
    "seeds": lambda row: len(row.values("best_val")),
    "ours": lambda row: mean(row, "best_val"),
    "SD": lambda row: f"{mean_ci(row.values('best_val'))[1]:.4f}" if row.has_interval else "",
    f"{LEVEL:.0%} interval": lambda row: format_interval(
        mean_ci(row.values("best_val"))[0] if row.has_interval else None
    ),
    "exact there": lambda row: mean(row, "full_val_at_best"),
    "its step": lambda row: mean(row, "best_step", 0),
    "inside?": inside,
}


def over_text(losses: Values, window: int, sign: str = "") -> str:
    """The interval of the mean of exact losses (n,) for another text of this kind, over the windows of this one.

    Windows are taken as independent: this text is too short for the block bootstrap that reports use.
    """
    windows = losses[: len(losses) // window * window].reshape(-1, window).mean(1)
    return format_interval(mean_ci(windows)[0], sign)


def difference_over_text(one: Comparison) -> str:
    assert one.first
    assert one.second
    values = difference_by_character(one.first.token_nll, one.second.token_nll)
    return over_text(values[~np.isnan(values)], one.second.token_nll.window, "+")


ESTIMATORS: Columns = {
    "run": lambda row: row.run,
    "exact": lambda row: mean(row, "full_val_at_best"),
    "over text": lambda row: over_text(row.ours.token_nll.mean, row.ours.token_nll.window),
    "estimates, mean": lambda row: mean(row, "expected_estimate"),
    "their SD": lambda row: f"{row.ours.sampling_error * row.ours.token_nll.chars_per_token:.4f}",
    "lowest estimate": lambda row: mean(row, "best_val"),
}
DIFFERENCES: Columns = {
    "difference": lambda one: one.name,
    **{name: COMPARISONS[name] for name in ("seeds", "mean", "over seeds")},
    "exact, over text": difference_over_text,
    "conclusion": COMPARISONS["conclusion"],
}


def train_loss(result: Result, step: int) -> float:
    """As the report's program logs it: with dropout, and with the balance loss, which our `train/loss` leaves out."""
    metrics, weight = result.metrics("train"), result.config["model"]["init_args"]["moe_aux_loss_coef"]
    loss = metrics["train/loss"] + weight * metrics["train/aux_loss"]
    return float(loss[metrics["step"] == step].item())


OF_A_SEED: dict[str, Callable[[Result], str]] = {
    "lowest estimate": lambda result: f"{result.summary['best_val']:.4f}",
    "its step": lambda result: str(result.summary["best_step"]),
    "last step": lambda result: str(result.summary["total_steps"]),
    "training loss there": lambda result: f"{result.summary['final_train_loss']:.4f}",
    "validation loss there": lambda result: f"{result.summary['final_val_loss']:.4f}",
    "training loss at step 2000": lambda result: f"{train_loss(result, 2000):.4f}",
}
REPORT_GIVES = {  # of the two runs of which it gives more than the lowest estimate
    "p2_refine": {"last step": "7200", "training loss there": "0.1443", "validation loss there": "3.0598"},
    "modern_moe_char_02": {"training loss at step 2000": "1.5611"},
}


def read_rows(folder: Path = RESULTS) -> list[Row]:
    groups = StudyAnalysis(folder).groups
    return [row._replace(ours=groups.get(row.run)) for row in REPORT]


def table(rows: list[Row]) -> str:
    return "\n".join(render_table(COLUMNS, rows))


def estimators(rows: list[Row]) -> str:
    return "\n".join(render_table(ESTIMATORS, [row for row in rows if row.ours]))


def seeds(rows: list[Row]) -> str:
    """A table for each run in REPORT_GIVES: the report's value and each seed of ours."""
    tables = []
    for run, more in REPORT_GIVES.items():
        row = next(row for row in rows if row.run == run)
        theirs = {"lowest estimate": f"{row.best_val:.4f}", "its step": str(row.best_step), **more}
        results = row.ours.results if row.ours else []
        ours = [[f"seed {result.seed}", *(OF_A_SEED[name](result) for name in theirs)] for result in results]
        columns: Columns = {name: itemgetter(i) for i, name in enumerate([f"`{run}`", *theirs])}
        tables.append("\n".join(render_table(columns, [["the report", *theirs.values()], *ours])))
    return "\n\n".join(tables)


def differences(folder: Path = RESULTS) -> str:
    return "\n".join(render_table(DIFFERENCES, StudyAnalysis(folder).comparisons))


def draw(rows: list[Row], path: Path) -> None:
    """Writes the picture: each run's estimates of all seeds, the exact losses there, and the report's value.

    Its description is the table, so that a test can see whether the picture shows the stored results.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    options: dict[str, Any] = {"svg.hashsalt": "minigpt", "svg.fonttype": "none", "font.size": 10}
    with pyplot.rc_context(options):
        figure, panels = pyplot.subplots(1, 2, figsize=(8, 4.2), sharey=True, width_ratios=(3, 1))
        for row in rows:
            axes = panels[int(row.run.startswith("bpe"))]
            for name, color, label in (
                ("full_val_at_best", EXACT, "ours, exact"),
                ("best_val", OURS, "ours, estimate"),
            ):
                values = row.values(name)
                axes.scatter(values, [row.rank] * len(values), s=22, color=color, label=label, zorder=3)
            if row.has_interval:
                axes.plot(next_seed(row.values("best_val")), [row.rank] * 2, color=OURS, linewidth=6, alpha=0.2)
            axes.scatter(
                row.best_val, row.rank, s=45, marker="D", color="none", edgecolors=THEIRS, label="the report", zorder=4
            )
        panels[0].set_yticks([row.rank for row in rows], [f"{row.run}  {row.rank}" for row in rows])
        panels[0].invert_yaxis()
        panels[0].set_xlabel("nats per character")
        panels[1].set_xlabel("nats per byte pair")
        panels[1].margins(x=0.15)
        for axes in panels:
            axes.grid(axis="y", linewidth=0.4, color="#dddddd")
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        handles, labels = panels[0].get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        figure.legend(shown.values(), shown.keys(), frameon=False, loc="upper right", ncols=3)
        figure.subplots_adjust(left=0.24, right=0.98, top=0.91, bottom=0.12, wspace=0.08)
        title = "The reference report's eleven runs over our seeds"
        figure.savefig(path, metadata={"Date": None, "Title": title, "Description": table(rows)})
        pyplot.close(figure)


if __name__ == "__main__":
    rows = read_rows()
    draw(rows, PICTURE)
    print(table(rows), estimators(rows), differences(), seeds(rows), sep="\n\n")
