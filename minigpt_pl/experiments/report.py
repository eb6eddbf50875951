"""`minigpt report`: writes report.md and its plots from the results folder of a study, and from nothing else.

The numbers are computed in `analysis`, the plots are drawn in `plots`. Two runs are compared in `run_comparison`.
"""

import html
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonargparse import ArgumentParser

from minigpt_pl.checkpoint.run_dir import RunDir
from minigpt_pl.experiments.analysis import StudyAnalysis, VariantResults
from minigpt_pl.experiments.results import Result
from minigpt_pl.experiments.run_comparison import compare_runs
from minigpt_pl.experiments.spec import STUDY_FILE
from minigpt_pl.experiments.tables import (
    Columns,
    align,
    format_interval,
    format_large,
    format_p,
    render_table,
)
from minigpt_pl.runtime.atomic_io import atomic_write
from minigpt_pl.runtime.errors import UserError

REPORT_FILE = "report.md"
EQUAL_SIZE = 0.03  # relative difference in parameters up to which two models count as equally large

INTRODUCTION = """\
Written by `python main.py report docs/results/{name}` from the files beside it; `docs/study.md` explains the numbers.
The command of each run is below. It belongs to the run's commit: options may have other names since.
"""
RESULTS = """
## Results

Nats per character {measured} at the best evaluation of each run (chosen on the same split), mean
over seeds; total and active parameters; what one seed needed until it stopped; the step of the best evaluation.
"""
MEASURED = {
    "full": "on the whole validation split",
    "sampled": "estimated from `eval_iters` random batches of the validation split",
}
ESTIMATORS = """
## Two estimators

Nats per token, means over seeds. `sampled`: the lowest of a run's estimates, as in the reference report; `expected`:
what an estimate of the same weights is on average, so the difference is luck; `exact there`: the same weights on the
whole validation split; `exact`: the lowest exact loss of a run, at its own step.
"""
DIFFERENCES = """
## Differences

Named before anything ran. `over seeds`: 95 % interval for another training on this text; `over text`: for another text
with these models; `corrected`: p after Holm's correction. The last columns: the first variant divided by the second.
"""


VARIANTS: Columns = {
    "run": lambda group: f"`{group.name}`",
    "seeds": lambda group: len(group.losses),
    "nats/char": lambda group: f"{group.mean:.4f}",
    "SD": lambda group: f"{group.spread[1]:.4f}" if group.spread else "cannot tell",
    "95 % interval": lambda group: format_interval(group.spread[0] if group.spread else None),
    "sampled": lambda group: f"{group.sampling_error:.4f}",
    "total": lambda group: f"{group.sizes['total']:,.0f}",
    "active": lambda group: f"{group.sizes['active']:,.0f}",
    "tokens": lambda group: format_large(group.summary_mean("tokens_seen")),
    "characters": lambda group: format_large(group.sizes["characters"]),
    "FLOPs": lambda group: format_large(group.sizes["FLOPs"]),
    "minutes": lambda group: f"{np.median([result.minutes for result in group.results]):.1f}",
    "step": lambda group: f"{group.summary_mean('best_step'):.0f}",
}
BOTH: Columns = {
    "run": lambda group: f"`{group.name}`",
    "sampled": lambda group: f"{group.summary_mean('best_val'):.4f}",
    "expected": lambda group: (
        f"{group.summary_mean('expected_estimate'):.4f}" if group.has("expected_estimate") else ""
    ),
    "exact there": lambda group: f"{group.summary_mean('full_val_at_best'):.4f}",
    "step": lambda group: f"{group.summary_mean('best_step'):.0f}",
    "exact": lambda group: f"{group.summary_mean('best_full_val'):.4f}",
    "its step": lambda group: f"{group.summary_mean('best_full_step'):.0f}",
}
COMPARISONS: Columns = {
    "difference": lambda one: f"`{one.name}`",
    "seeds": lambda one: f"{one.test.seeds[0]} pairs" if one.test.is_paired else "{} and {}".format(*one.test.seeds),
    "mean": lambda one: f"{one.test.interval.mean:+.4f}" if one.test.interval else "",
    "over seeds": lambda one: format_interval(one.test.interval, "+"),
    "p": lambda one: format_p(one.test.p) if one.test.has_enough else "",
    "corrected": lambda one: format_p(one.corrected_p) if one.test.has_enough else "",
    "sign flips": lambda one: "{:.4f} (minimum {:.4f})".format(*one.test.flips) if one.test.flips else "",
    "over text": lambda one: format_interval(one.over_text, "+"),
    "conclusion": lambda one: f"**{one.conclusion}**",
}
OVERVIEW = ("run", "seeds", "nats/char", "SD", "95 % interval", "difference", "mean", "over seeds", "conclusion")
RUNS: Columns = {
    "run": lambda result: f"`{result}`",
    "nats/char": lambda result: f"{result.summary['best_nats_per_char']:.4f}",
    "best step": lambda result: result.summary["best_step"],
    "steps": lambda result: result.summary["total_steps"],
    "stopped": lambda result: result.summary["stop_reason"],
    "minutes": lambda result: f"{result.minutes:.2f}",
    "commit": lambda result: f"{(x := result.summary['git_commit'] or '')[:8]}{' and changes' * ('-' in x)}",
    "command": lambda result: f"`{result.command}`",
}


def ratio(pair: Any, size: str) -> str:
    """A size or training budget of the pair's first variant divided by that of the second."""
    return f"{pair.first.sizes[size] / pair.second.sizes[size]:.2f}" if pair.first and pair.second else ""


RATIOS: Columns = {size: partial(ratio, size=size) for size in ("total", "active", "characters", "FLOPs")}


# A mixture of experts and a dense model of equal size, if there is one.
class Match(NamedTuple):
    first: VariantResults
    size: str
    second: VariantResults | None


MATCHES: Columns = {
    "experts": lambda match: f"`{match.first.name}`",
    "nats/char": lambda match: f"{match.first.mean:.4f}",
    "equal in": lambda match: f"{match.size} parameters",
    "dense": lambda match: f"`{match.second.name}`" if match.second else "not run",
    "its nats/char": lambda match: f"{match.second.mean:.4f}" if match.second else "",
}


def matches(study: StudyAnalysis) -> Iterator[Match]:
    """Each mixture of experts with all dense models of its size, by either count, whatever their budget."""
    for moe in (group for group in study.ranked() if group.has_experts):
        dense = [one for one in study.ranked() if not one.has_experts and one.tokenizer == moe.tokenizer]
        for size in ("active", "total"):
            equal = [one for one in dense if abs(one.sizes[size] / moe.sizes[size] - 1) <= EQUAL_SIZE]
            yield from [Match(moe, size, one) for one in equal] or [Match(moe, size, None)]


def samples(study: StudyAnalysis) -> Iterator[str]:
    """A sample of each variant's first seed, three side by side; a blank line would end the table."""
    firsts = [group.results[0] for group in study.ranked()]
    yield "<table>"
    for row in (firsts[start : start + 3] for start in range(0, len(firsts), 3)):
        yield "<tr>" + "".join(f"<th>{result}</th>" for result in row) + "</tr>"
        texts = (html.escape(result.sample.strip(), quote=False).replace("\n", "<br>") for result in row)
        yield "<tr>" + "".join(f"<td valign=top>{text}</td>" for text in texts) + "</tr>"
    yield "</table>"


def render_report(study: StudyAnalysis, plots: Iterable[str]) -> str:
    """The text of report.md."""
    results = [result for group in study.groups.values() for result in group.results]
    name = study.folder.resolve().name

    def distinct(get: Callable[[Result], Any]) -> str:
        return "; ".join(sorted({str(get(result)) for result in results}))

    modes = {"full" if result.config["data"]["eval_mode"] == "full" else "sampled" for result in results}
    both = [group for group in study.ranked() if group.has("best_full_val")]
    missing = [f"`{name}`" for name in study.study.variants if name not in study.groups]
    lines = [
        f"# {name}\n",
        f"{study.study.content.get('description', '')}\n",
        INTRODUCTION.format(name=name),
        f"- machine: {distinct(lambda result: result.machine)}",
        f"- torch: {distinct(lambda result: result.summary['versions']['torch'])}",
        f"- SHA-256 of the text: {distinct(lambda result: result.summary['data_sha256'][:16])}",
        *([f"- not run: {', '.join(missing)}"] if missing else []),
        *([f"- not shown, since the study does not name them: {', '.join(study.unnamed)}"] if study.unnamed else []),
        *(f"- failed: `{name}`: {reason}" for name, reason in study.failed.items()),
        RESULTS.format(measured=" or ".join(MEASURED[mode] for mode in sorted(modes))),
        *render_table(VARIANTS, study.ranked()),
    ]
    if study.baselines:
        values = ", ".join(f"{name} {values['nats_per_char']:.4f}" for name, values in study.baselines.items())
        lines.append(f"\nBaselines: {values}.")
    if both:
        lines += [ESTIMATORS, *render_table(BOTH, both)]
    if study.comparisons:
        lines += [DIFFERENCES, *render_table(COMPARISONS | RATIOS, study.comparisons)]
    if experts := [*matches(study)]:
        lines += ["\n## Experts and dense models of equal size\n", *render_table(MATCHES | RATIOS, experts)]
    lines += [f"\n![{Path(plot).stem}]({plot})" for plot in plots]
    lines += ["\n## Samples\n", *samples(study), "\n## All runs\n", *render_table(RUNS, results)]
    return "\n".join(lines) + "\n"


def overview(study: StudyAnalysis) -> str:
    """The most important columns for a terminal."""
    lines = []
    for columns, items in ((VARIANTS, study.ranked()), (COMPARISONS, study.comparisons)):
        shown = {head: cell for head, cell in columns.items() if head in OVERVIEW}
        rows = [[*shown], *([str(cell(item)).strip("`*") for cell in shown.values()] for item in items)]
        lines += [*align(rows), ""] if items else [""]
    return "\n".join(lines).strip()


def run(command: str, options: list[str]) -> int:
    """Writes report.md and the plots of a results folder, or prints a comparison of two runs."""
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description=__doc__)
    help = "The results of a study, such as docs/results/journey; or two run directories, to compare them."
    parser.add_argument("folders", type=str, nargs="+", help=help)
    folders = [Path(folder) for folder in parser.parse_args(options).folders]
    if len(folders) > 1:
        print(compare_runs(check_runs(folders)))
        return 0
    (folder,) = folders
    check_results(folder)
    for module in ("scipy", "matplotlib"):
        if find_spec(module) is None:
            raise UserError(f"a report needs {module}", remedy='pip install "minigpt_pl[study]"')
    from minigpt_pl.experiments.plots import draw_plots  # matplotlib is slow to import

    study = StudyAnalysis(folder)
    atomic_write(folder / REPORT_FILE, render_report(study, draw_plots(study)).encode())
    print(f"{overview(study)}\n\n{folder / REPORT_FILE}")
    return 0


def check_results(folder: Path) -> None:
    """Raises UserError if a folder does not hold the results of a study."""
    if (folder / STUDY_FILE).is_file():
        return
    if RunDir(folder, False).holds_run():
        remedy = "name a second run to compare it with"
        raise UserError(f"report {folder}: it holds a run, not the results of a study", remedy=remedy)
    runs = sorted(path for path in folder.glob("*/") if RunDir(path, False).holds_run())
    remedy = f"name two of the runs in it, such as {runs[0]}, or " if runs else ""
    raise UserError(
        f"report {folder}: it holds no {STUDY_FILE}", remedy=f"{remedy}name a folder that minigpt study has written"
    )


def check_runs(folders: list[Path]) -> list[Path]:
    """The two run directories; UserError if they are not two, or one of them holds no run."""
    if len(folders) > 2:
        raise UserError(f"report compares two runs, not {len(folders)}", remedy="name two, or write a study")
    for folder in folders:
        if not RunDir(folder, False).holds_run():
            kind = "the results of a study" if (folder / STUDY_FILE).is_file() else "no run"
            remedy = "name two run directories, or one folder of results"
            raise UserError(f"report {folder}: it holds {kind}", remedy=remedy)
    return folders
