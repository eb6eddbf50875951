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

from minigpt_pl.errors import InputError
from minigpt_pl.findings import Comparison, Findings, Group
from minigpt_pl.plans import STUDY
from minigpt_pl.results import Result
from minigpt_pl.statistics import SEEDS_OF_A_COMPARISON, SEEDS_OF_A_SPREAD, Interval
from minigpt_pl.text import write_atomically

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
    power = max(0, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.3g}{['', ' k', ' M', ' G', ' T', ' P', ' E'][power]}"


def results_table(report: Findings) -> Iterator[str]:
    head = ("run", "seeds", "nats/char", "SD", "95 % interval", "total", "active", "tokens", "FLOPs", "minutes", "step")

    def row(group: Group) -> Iterator[str]:
        yield f"`{group.name}`"
        yield str(len(group.figures))
        yield f"{group.mean:.4f}"
        yield f"{group.spread[1]:.4f}" if group.spread else "cannot tell"
        yield between(group.spread[0]) if group.spread else ""
        yield f"{group.of_summary('params_total'):,.0f}"
        yield f"{group.of_summary('params_active'):,.0f}"
        yield short(group.of_summary("tokens_seen"))
        yield short(group.flops)
        yield f"{group.of_summary('wall_seconds') / 60:.2f}"
        yield f"{group.of_summary('best_step'):.0f}"

    return table(head, map(row, report.ranked()))


def differences_table(report: Findings) -> Iterator[str]:
    head = ("difference", "seeds", "mean", "over seeds", "p", "corrected", "sign flips", "over text", "verdict")

    def row(found: Comparison) -> Iterator[str]:
        seeds = found.over_seeds
        yield f"`{found.name}`"
        yield f"{seeds.seeds[0]} pairs" if seeds.is_paired else f"{seeds.seeds[0]} and {seeds.seeds[1]}"
        yield f"{seeds.interval.mean:+.4f}" if seeds.interval else ""
        yield between(seeds.interval, "+")
        yield f"{seeds.p:.4f}" if seeds.interval else ""
        yield f"{found.corrected:.4f}" if seeds.has_enough else ""
        yield f"{seeds.flips[0]:.4f} (least {seeds.flips[1]:.4f})" if seeds.flips else ""
        yield between(found.over_text, "+")
        yield f"**{found.verdict}**"

    return table(head, map(row, report.comparisons))


def experts(report: Findings) -> Iterator[str]:
    """Each mixture of experts beside the dense models of its size, by both counts."""
    dense = [group for group in report.groups.values() if not group.has_experts]

    def alike(moe: Group, count: str) -> str:
        wanted, text = moe.of_summary(count), moe.summaries[0]["tokenizer_sha256"]
        same_text = [group for group in dense if group.summaries[0]["tokenizer_sha256"] == text]
        found = [group for group in same_text if abs(group.of_summary(count) / wanted - 1) <= ALIKE]
        return "; ".join(f"`{group.name}` {group.mean:.4f}" for group in found) or "not run"

    def row(moe: Group) -> Iterator[str]:
        yield f"`{moe.name}`"
        yield f"{moe.mean:.4f}"
        yield alike(moe, "params_active")
        yield alike(moe, "params_total")

    moes = [group for group in report.ranked() if group.has_experts]
    return table(("experts", "nats/char", "dense, as many active", "dense, as many in all"), map(row, moes))


def samples(report: Findings) -> Iterator[str]:
    """What the first seed of each writes, three side by side; no line is blank, which would end the table."""
    groups = report.ranked()
    yield "<table>"
    for begin in range(0, len(groups), 3):
        three = [group.results[0] for group in groups[begin : begin + 3]]
        yield "<tr>" + "".join(f"<th>{result.folder.name}</th>" for result in three) + "</tr>"
        texts = (html.escape(result.sample.strip(), quote=False).replace("\n", "<br>") for result in three)
        yield "<tr>" + "".join(f"<td valign=top>{text}</td>" for text in texts) + "</tr>"
    yield "</table>"


def runs_table(report: Findings) -> Iterator[str]:
    head = ("run", "nats/char", "best step", "steps", "stopped", "minutes", "commit", "command")

    def row(result: Result) -> Iterator[str]:
        found = result.summary
        yield f"[{result.folder.name}](runs/{result.folder.name})"
        yield f"{found['best_nats_per_char']:.4f}"
        yield f"{found['best_step']}"
        yield f"{found['total_steps']}"
        yield found["stop_reason"]
        yield f"{found['wall_seconds'] / 60:.2f}"
        yield (found["git_commit"] or "")[:8]
        yield f"`{found['command']}`"

    return table(head, (row(result) for group in report.groups.values() for result in group.results))


def index(report: Findings, pictures: Iterable[str]) -> str:
    """The text of index.md."""
    everything = [result for group in report.groups.values() for result in group.results]
    name = report.folder.resolve().name

    def distinct(what: Callable[[Result], Any]) -> str:
        return "; ".join(sorted({str(what(result)) for result in everything}))

    missing = [name for name in report.study.configurations if name not in report.groups]
    lines = [
        f"# {name}\n",
        f"{report.study.content.get('about', '')}\n",
        f"Written by `python main.py report {Path('docs/results') / name}` from the files beside it; each run's own "
        "command is below. `docs/study.md` says what the numbers mean.\n",
        f"- machine: {distinct(lambda result: result.summary['machine'])}",
        f"- torch: {distinct(lambda result: result.summary['versions']['torch'])}",
        f"- text, by its SHA-256: {distinct(lambda result: result.summary['data_sha256'][:16])}",
        *([f"- not run: {', '.join(f'`{name}`' for name in missing)}"] if missing else []),
        "\n## Results\n",
        "Nats per character of the whole validation part at the best check, mean over seeds; parameters, and what a "
        f"seed took until it stopped; the step of the best check. With fewer than {SEEDS_OF_A_SPREAD} seeds a spread "
        "cannot be told.\n",
        *results_table(report),
    ]
    if report.floors:
        reached = ", ".join(f"{name} {found['nats_per_char']:.4f}" for name, found in report.floors.items())
        lines.append(f"\nWhat simple methods reach: {reached}.")
    if report.comparisons:
        lines += [
            "\n## Differences\n",
            "Named before anything ran. Pairs share their batches; other groups are compared by Welch's test. `over "
            "seeds` is another training on this text, `over text` another text for these models. Corrected p: Holm, "
            f"over all that were named. With fewer than {SEEDS_OF_A_COMPARISON} seeds on either side: cannot tell.\n",
            *differences_table(report),
        ]
    if any(group.has_experts for group in report.groups.values()):
        lines += ["\n## Experts against dense models of equal size\n", *experts(report)]
    for picture in pictures:
        lines.append(f"\n![{Path(picture).stem}]({picture})")
    lines += ["\n## What they write\n", *samples(report), "\n## Every run\n", *runs_table(report)]
    return "\n".join(lines) + "\n"


def overview(report: Findings) -> str:
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
    if not (folder / STUDY).is_file():
        raise InputError(f"report {folder}: it holds no {STUDY}: name a results folder that minigpt study has written")
    for module in ("scipy", "matplotlib"):
        if find_spec(module) is None:
            raise InputError(f'a report needs {module}: pip install "minigpt_pl[study]"')
    from minigpt_pl.pictures import draw  # matplotlib is slow to import

    report = Findings(folder)
    write_atomically(folder / INDEX, index(report, draw(report)).encode())
    print(overview(report))
    print(f"\n{folder / INDEX}")
    return 0
