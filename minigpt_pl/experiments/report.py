"""`minigpt report`: writes what the results of a study say, as index.md with pictures, from its results folder alone.

The numbers are computed in `findings`, the pictures drawn in `pictures`; nothing is trained or scored here.
"""

import html
import math
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from minigpt_pl.experiments.analysis import Comparison, StudyAnalysis, VariantResults
from minigpt_pl.experiments.results import Result
from minigpt_pl.experiments.spec import STUDY_FILE
from minigpt_pl.experiments.statistics import MIN_SEEDS_COMPARISON, MIN_SEEDS_INTERVAL, Interval
from minigpt_pl.runtime.atomic_io import atomic_write
from minigpt_pl.runtime.errors import UserError

INDEX = "index.md"
ALIKE = 0.03
"""Share by which two models' parameters may differ and still count as equally many."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A table in Markdown; all columns but the first are numbers."""
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield "|---|" + "--:|" * (len(head) - 1)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def between(interval: Interval | None, sign: str = "") -> str:
    return "" if interval is None else f"{interval.low:{sign}.4f} ... {interval.high:{sign}.4f}"


def short(number: float) -> str:
    """Three digits of a large number."""
    number = float(f"{number:.3g}")
    power = max(0, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.3g}{['', ' k', ' M', ' G', ' T', ' P', ' E'][power]}"


def p_value(p: float) -> str:
    return f"{p:.4f}" if p >= 0.00005 else "< 0.0001"


BUDGET = ("tokens", "characters", "FLOPs", "minutes")


def budget(group: VariantResults) -> Iterator[str]:
    """What the training of one seed took."""
    yield short(group.of_summary("tokens_seen"))
    yield short(group.characters)
    yield short(group.flops)
    yield f"{group.minutes:.1f}"


def results_table(report: StudyAnalysis) -> Iterator[str]:
    head = ("run", "seeds", "nats/char", "SD", "95 % interval", "sampled", "total", "active", *BUDGET, "step")

    def row(group: VariantResults) -> Iterator[str]:
        yield f"`{group.name}`"
        yield str(len(group.figures))
        yield f"{group.mean:.4f}"
        yield f"{group.spread[1]:.4f}" if group.spread else "cannot tell"
        yield between(group.spread[0]) if group.spread else ""
        yield f"{group.sampling_error:.4f}"
        yield f"{group.of_summary('params_total'):,.0f}"
        yield f"{group.of_summary('params_active'):,.0f}"
        yield from budget(group)
        yield f"{group.of_summary('best_step'):.0f}"

    return table(head, map(row, report.ranked()))


SHARES = ("total", "active", "characters", "FLOPs")


def shares(a: VariantResults, b: VariantResults) -> Iterator[str]:
    """What the first of two has or took, in units of the second."""
    if not (a.results and b.results):
        yield from [""] * len(SHARES)
        return
    for count in ("params_total", "params_active"):
        yield f"{a.of_summary(count) / b.of_summary(count):.2f}"
    yield f"{a.characters / b.characters:.2f}"
    yield f"{a.flops / b.flops:.2f}"


def differences_table(report: StudyAnalysis) -> Iterator[str]:
    head = (
        "difference", "seeds", "mean", "over seeds", "p", "corrected", "sign flips", "over text", "verdict", *SHARES
    )  # fmt: skip

    def row(found: Comparison) -> Iterator[str]:
        seeds = found.over_seeds
        yield f"`{found.name}`"
        yield f"{seeds.seeds[0]} pairs" if seeds.is_paired else f"{seeds.seeds[0]} and {seeds.seeds[1]}"
        yield f"{seeds.interval.mean:+.4f}" if seeds.interval else ""
        yield between(seeds.interval, "+")
        yield p_value(seeds.p) if seeds.has_enough else ""
        yield p_value(found.corrected) if seeds.has_enough else ""
        yield f"{seeds.flips[0]:.4f} (least {seeds.flips[1]:.4f})" if seeds.flips else ""
        yield between(found.over_text, "+")
        yield f"**{found.verdict}**"
        yield from shares(*map(report.group, found.pair))

    return table(head, map(row, report.comparisons))


def experts(report: StudyAnalysis) -> Iterator[str]:
    """Each mixture of experts beside the dense models of its size, by either count, also those of other budgets."""
    dense = [group for group in report.ranked() if not group.has_experts]

    def row(moe: VariantResults, words: str, other: VariantResults | None) -> Iterator[str]:
        yield f"`{moe.name}`"
        yield f"{moe.mean:.4f}"
        yield words
        yield f"`{other.name}`" if other else "not run"
        yield f"{other.mean:.4f}" if other else ""
        yield from shares(moe, other) if other else [""] * len(SHARES)

    def rows() -> Iterator[Iterator[str]]:
        for moe in (group for group in report.ranked() if group.has_experts):
            for count, words in (("params_active", "as many active"), ("params_total", "as many in all")):
                found = [group for group in dense if group.tokenizer == moe.tokenizer]
                found = [one for one in found if abs(one.of_summary(count) / moe.of_summary(count) - 1) <= ALIKE]
                yield from (row(moe, words, other) for other in found)
                if not found:
                    yield row(moe, words, None)

    return table(("experts", "nats/char", "of which", "dense", "nats/char", *SHARES), rows())


def samples(report: StudyAnalysis) -> Iterator[str]:
    """What the first seed of each writes, three side by side; no line is blank, which would end the table."""
    groups = report.ranked()
    yield "<table>"
    for begin in range(0, len(groups), 3):
        three = [group.results[0] for group in groups[begin : begin + 3]]
        yield "<tr>" + "".join(f"<th>{result.folder.name}</th>" for result in three) + "</tr>"
        texts = (html.escape(result.sample.strip(), quote=False).replace("\n", "<br>") for result in three)
        yield "<tr>" + "".join(f"<td valign=top>{text}</td>" for text in texts) + "</tr>"
    yield "</table>"


def runs_table(report: StudyAnalysis) -> Iterator[str]:
    head = ("run", "nats/char", "best step", "steps", "stopped", "minutes", "commit", "command")

    def row(result: Result) -> Iterator[str]:
        found = result.summary
        yield f"[{result.folder.name}](runs/{result.folder.name})"
        yield f"{found['best_nats_per_char']:.4f}"
        yield f"{found['best_step']}"
        yield f"{found['total_steps']}"
        yield found["stop_reason"]
        yield f"{result.minutes:.2f}"
        commit, _, dirty = (found["git_commit"] or "").partition("-")
        yield f"{commit[:8]}{dirty and ' and changes'}"
        yield f"`{found['command']}`"

    return table(head, (row(result) for group in report.groups.values() for result in group.results))


def render_report(report: StudyAnalysis, pictures: Iterable[str]) -> str:
    """The text of index.md."""
    everything = [result for group in report.groups.values() for result in group.results]
    name = report.folder.resolve().name

    def distinct(what: Callable[[Result], Any]) -> str:
        return "; ".join(sorted({str(what(result)) for result in everything}))

    missing = [name for name in report.study.configurations if name not in report.groups]
    lines = [
        f"# {name}\n",
        f"{report.study.content.get('description', '')}\n",
        f"Written by `python main.py report {Path('docs/results') / name}` from the files beside it; each run's own "
        "command is below, and is meant at its commit. `docs/study.md` says what the numbers mean.\n",
        f"- machine: {distinct(lambda result: result.summary['machine'])}",
        f"- torch: {distinct(lambda result: result.summary['versions']['torch'])}",
        f"- text, by its SHA-256: {distinct(lambda result: result.summary['data_sha256'][:16])}",
        *([f"- not run: {', '.join(f'`{name}`' for name in missing)}"] if missing else []),
        *([f"- left out, since the study does not name them: {', '.join(report.others)}"] if report.others else []),
        *(f"- failed: `{name}`: {why}" for name, why in report.failed.items()),
        "\n## Results\n",
        "Nats per character of the whole validation part at the best check, which was chosen on that part, mean over "
        "seeds; `sampled`: the SD that a check would have had by the run's `eval_iters` random batches in place of the "
        "whole part; parameters, and what a seed took until it stopped (characters: tokens by their mean length; "
        "minutes: of training at a run's median speed, checks aside, the median over seeds); the step of the best "
        f"check. With fewer than {MIN_SEEDS_INTERVAL} seeds a spread cannot be told.\n",
        *results_table(report),
    ]
    if report.baselines:
        reached = ", ".join(f"{name} {found['nats_per_char']:.4f}" for name, found in report.baselines.items())
        lines.append(f"\nWhat simple methods reach: {reached}.")
    if report.comparisons:
        lines += [
            "\n## Differences\n",
            "Named before anything ran. Pairs share their batches; other groups are compared by Welch's test. `over "
            "seeds` is another training on this text, `over text` another text for these models. Corrected p: Holm, "
            f"over all that were named. With fewer than {MIN_SEEDS_COMPARISON} seeds on either side: cannot tell. The "
            "last columns: what the first of the two has or took, in units of the second.\n",
            *differences_table(report),
        ]
    if any(group.has_experts for group in report.groups.values()):
        lines += ["\n## Experts against dense models of equal size\n", *experts(report)]
    for picture in pictures:
        lines.append(f"\n![{Path(picture).stem}]({picture})")
    lines += ["\n## What they write\n", *samples(report), "\n## Every run\n", *runs_table(report)]
    return "\n".join(lines) + "\n"


def overview(report: StudyAnalysis) -> str:
    """The same in a few lines for a terminal."""
    wide = max(len(name) for name in [*report.groups, *(found.name for found in report.comparisons)])
    lines = [f"{'':{wide}}  seeds  nats/char      SD  95 % interval"]
    for group in report.ranked():
        tail = f"{group.spread[1]:.4f}  {between(group.spread[0])}" if group.spread else "cannot tell: too few seeds"
        lines.append(f"{group.name:{wide}}  {len(group.figures):5}  {group.mean:9.4f}  {tail}")
    for found in report.comparisons:
        seeds, interval = found.over_seeds, found.over_seeds.interval
        if interval is not None:
            shown = (
                f"{found.name:{wide}}  {min(seeds.seeds):5}  {interval.mean:+9.4f}          {between(interval, '+')}"
            )
            kind = "paired" if seeds.is_paired else "unpaired"
            lines.append(f"{shown}  {kind}, p {seeds.p:.3f}: {found.verdict}")
    return "\n".join(lines)


def run(command: str, options: list[str]) -> int:
    """Writes index.md and the pictures of a results folder."""
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description=__doc__)
    parser.add_argument("folder", type=str, help="A results folder, such as docs/results/journey.")
    folder = Path(parser.parse_args(options).folder)
    if not (folder / STUDY_FILE).is_file():
        raise UserError(
            f"report {folder}: it holds no {STUDY_FILE}: name a results folder that minigpt study has written"
        )
    for module in ("scipy", "matplotlib"):
        if find_spec(module) is None:
            raise UserError(f'a report needs {module}: pip install "minigpt_pl[study]"')
    from minigpt_pl.experiments.plots import draw_plots  # matplotlib is slow to import

    report = StudyAnalysis(folder)
    atomic_write(folder / INDEX, render_report(report, draw_plots(report)).encode())
    print(overview(report))
    print(f"\n{folder / INDEX}")
    return 0
