"""The report follows from the results folder alone, and each committed report agrees with its results.

Results are made up and stored here as a study would store them; no model is trained.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import PROJECT, Outcome
from matplotlib.figure import Figure
from PIL import Image

from minigpt_pl.experiments.analysis import StudyAnalysis
from minigpt_pl.experiments.plots import draw_plots, plot_curves, plot_experts
from minigpt_pl.experiments.report import render_report
from minigpt_pl.experiments.results import Result, TokenNLL, add_result, read_results, read_token_nll, write_files
from minigpt_pl.experiments.spec import STUDY_FILE, resolve_config
from minigpt_pl.experiments.tables import format_large
from minigpt_pl.runtime.errors import UserError

COMMITTED = sorted(path.parent for path in PROJECT.glob(f"docs/results/*/{STUDY_FILE}"))
NOISE = np.random.default_rng(3).normal(0, 0.0025, (4, 8))
resolve = cache(lambda args: resolve_config(args.split()))


def agrees(folder: Path, text: str) -> bool:
    """Whether a report agrees with the results in its folder."""
    plots = re.findall(r"^!\[\w+\]\((.*)\)$", text, re.MULTILINE)
    return all((folder / name).is_file() for name in plots) and render_report(StudyAnalysis(folder), plots) == text


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_a_committed_report_agrees_with_its_results(folder: Path) -> None:
    assert agrees(folder, (folder / "report.md").read_text("utf-8")), f"python main.py report {folder}"


def test_committed_results_are_few_and_small() -> None:
    for folder in COMMITTED:
        assert sum(path.is_file() for path in folder.rglob("*")) <= 20, folder
    assert sum(path.stat().st_size for folder in COMMITTED for path in folder.rglob("*")) <= 7_000_000


def result_of(
    name: str, seed: int, best: float, args: str = "", length: int = 1, **summary: Any
) -> tuple[Result, TokenNLL]:
    """A made-up run with a given best loss, whose tokens have `length` characters."""
    config = resolve(f"--model.block_size 128 {args}") | {"seed_everything": seed}
    losses = length * (best + 0.1 * np.sin(np.arange(128 * 50) / 7)).astype(np.float32)
    starts = np.arange(50, dtype=np.int32) * 128 * length + 1
    nll = TokenNLL(losses, np.array([seed]), np.full(len(losses), length, np.uint8), starts, 128)
    values = {
        "best_nats_per_char": best, "best_step": 200, "total_steps": 200, "stop_reason": "completed",
        "params_total": 1000, "params_active": 1000, "tokens_seen": 409_600, "flops_per_token": 6000,
        "wall_seconds": 90.0, "git_commit": "0123456789", "versions": {"torch": "2.13"}, "window_sd": nll.window_sd(),
        "data_sha256": "d" * 64, "tokenizer_sha256": "t" * 64,
    }  # fmt: skip
    loads = {f"moe/load_0_{expert}": "0.25" for expert in range(4)} if "moe" in args else {}
    # no speed at the first log; the last one of a machine that slept
    speeds = [{}, *({"perf/tokens_per_s": speed} for speed in ("10240", "6400", "5120"))]
    rows = [{"step": f"{50 * n}", "split": "train", **speed, **loads} for n, speed in enumerate(speeds, 1)]
    rows += [{"step": s, "split": "val", "val/nats_per_char": str(x)} for s, x in (("100", best + 0.5), ("200", best))]
    command = f"minigpt fit --seed_everything {seed}"
    return Result(name, seed, command, "2 CPU cores", config, values | summary, f"<{name}> & more", rows), nll


def change(folder: Path, **changes: Callable[[Result], None]) -> None:
    """Changes results by their names (with _ for -) in place."""
    results = read_results(folder)
    for result in results:
        changes.get(str(result).replace("-", "_"), lambda result: None)(result)
    write_files(folder, results, read_token_nll(folder))


def make_study(folder: Path, stored: list[tuple[Result, TokenNLL]], **content: Any) -> Path:
    losses: dict[str, TokenNLL] = {}
    for result, nll in stored:
        losses[result.name] = losses[result.name] + nll if result.name in losses else nll
    folder.mkdir(exist_ok=True)
    write_files(folder, [result for result, _ in stored], losses)
    (folder / STUDY_FILE).write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seeds of each: sparse is five SD lower than dense; wide has other batches, rare three seeds."""
    runs = []
    for seed in range(8):
        runs.append(result_of("dense", seed, 1.25 + NOISE[0, seed]))
        sizes = {"params_total": 3000, "params_active": 1010}
        runs.append(result_of("sparse", seed, 1.25 - 0.012 + NOISE[1, seed], "-c moe", **sizes))
        runs.append(result_of("wide", seed, 1.25 + NOISE[2, seed], "--data.batch_size 16", params_total=3000))
        if seed < 3:
            runs.append(result_of("rare", seed, 1.0 + NOISE[3, seed]))
            runs.append(result_of("unnamed", seed, 1.0))
        bpe = ("--data.tokenizer bpe", 3)
        runs.append(result_of("bpe", seed, 1.25 + NOISE[3, seed], *bpe, tokenizer_sha256="b" * 64))
        runs.append(result_of("elsewhere", seed, 0.5, "--data.test_frac 0.05"))
    folder = make_study(
        tmp_path_factory.mktemp("results") / "made",
        runs,
        description="A made study.",
        runs=dict.fromkeys(("dense", "sparse", "wide", "rare", "never", "bpe", "elsewhere"), ""),
        comparisons=[f"{name} - dense" for name in ("sparse", "wide", "rare", "never", "elsewhere", "bpe")],
    )
    baselines = {"unigram": {"nats_per_char": 3.1}, "xz": {"nats_per_char": 1.7}}
    text = {"data_sha256": "d" * 64, "train_frac": 0.9, "test_frac": 0.0, "baselines": baselines}
    (folder / "baselines.json").write_text(json.dumps(text))
    (folder / "failed.json").write_text(json.dumps({"rare-4": "it diverged"}))
    return folder


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "made"))


def test_the_report_shows_what_the_results_hold(made: Path, minigpt: Callable[..., Outcome]) -> None:
    done = minigpt("report", made)
    assert done.status == 0, done.err
    text = (made / "report.md").read_text("utf-8")
    assert agrees(made, text)
    cells = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.split("## Differences")[0].splitlines()
    ]
    row = {first: rest for first, *rest in (line for line in cells if line) if rest}
    values = 1.25 + NOISE[0]
    half = 2.3646 * values.std(ddof=1) / 8**0.5  # Student's t, 7 degrees of freedom
    assert row["dense"][:4] == [
        "8", f"{values.mean():.4f}", f"{values.std(ddof=1):.4f}",
        f"{values.mean() - half:.4f} ... {values.mean() + half:.4f}",
    ]  # fmt: skip
    assert row["rare"][0] == "3"
    window = 0.1 * np.sin(np.arange(128 * 50) / 7).reshape(50, 128).mean(1)
    assert row["dense"][4] == f"{window.std(ddof=1) / (100 * 8) ** 0.5:.4f}"
    assert row["sparse"][5:7] == ["3,000", "1,010"]
    assert row["dense"][5:11] == ["1,000", "1,000", "410 k", "410 k", "2.46 G", "1.1"]  # at 6400 tokens a second
    assert row["bpe"][7:9] == ["410 k", "1.23 M"]  # tokens of three characters each
    differences = text[text.index("## Differences") : text.index("## Experts")]
    conclusions = dict(re.findall(r"^\| `(.*?)` .*\*\*(.*)\*\* \|", differences, re.MULTILINE))
    assert conclusions == {
        "sparse - dense": "lower",
        "wide - dense": "no difference found",
        "rare - dense": "cannot tell",
        "never - dense": "cannot tell",
        "elsewhere - dense": "cannot tell",  # of another text
        "bpe - dense": "no difference found",
    }
    assert "`never - dense` | 0 and 8 |" in differences
    assert "**lower** | 3.00 | 1.01 | 1.00 | 1.00 |" in differences
    assert differences.strip().endswith("| 1.00 | 1.00 | 3.00 | 1.00 |")
    assert "8 pairs" in differences
    assert "`wide - dense` | 8 and 8 |" in differences  # other batches are not pairs
    assert "`rare - dense` | 3 pairs |" in differences
    assert "- not run: `never`" in text
    assert "- failed: `rare-4`: it diverged" in text
    assert "the study does not name them: unnamed" in text
    experts = text[text.index("## Experts") : text.index("![curves]")]
    assert f"| active parameters | `dense` | {values.mean():.4f} | 3.00 | 1.01 | 1.00 | 1.00 |" in experts
    assert f"| total parameters | `wide` | {1.25 + NOISE[2].mean():.4f} | 1.00 | 1.01 | 1.00 | 1.00 |" in experts
    assert "`bpe`" not in experts  # of other tokens
    assert "Baselines: unigram 3.1000, xz 1.7000." in text
    assert "&lt;sparse&gt; &amp; more" in text
    for result in read_results(made):
        row_of_run = f"| `{result}` | {result.summary['best_nats_per_char']:.4f} |"
        assert (row_of_run in text) == (result.name != "unnamed")
    assert "| `minigpt fit --seed_everything 7` |" in text
    for name in ("curves", "differences", "experts", "positions"):
        with Image.open(made / f"{name}.png") as image:
            assert image.size == (900, 500)
            drawn = sum(count for count, _ in image.getcolors()) - max(count for count, _ in image.getcolors())
            assert drawn > 4_000, f"{name}.png is nearly empty"


def test_the_difference_over_text_is_of_the_same_seeds_as_the_one_over_seeds(made: Path) -> None:
    def of(name: str) -> Any:
        return {one.name: one for one in StudyAnalysis(made).comparisons}[f"{name} - dense"]

    assert of("sparse").over_text.mean == pytest.approx(of("sparse").test.interval.mean, abs=1e-6)
    assert of("wide").over_text.mean == pytest.approx(of("wide").test.interval.mean, abs=1e-6)
    assert of("rare").over_text is None  # a sum over three seeds, and one over eight
    add_result(made, *result_of("sparse", 8, 9.0, "-c moe"))
    add_result(made, *result_of("wide", 8, 9.0, "--data.batch_size 16"))
    assert of("sparse").test.seeds == (8, 8)
    assert of("sparse").over_text is None
    assert of("wide").test.seeds == (9, 8)
    assert of("wide").over_text.mean == pytest.approx(of("wide").test.interval.mean, abs=1e-6)


def test_a_seed_can_be_added_once(made: Path) -> None:
    """The sum over seeds is that of all results; a seed that an interrupted write has left in it is not added twice."""
    result, nll = result_of("rare", 3, 2.0)
    before = read_token_nll(made)["rare"]
    write_files(made, read_results(made), read_token_nll(made) | {"rare": before + nll})  # runs.jsonl was not reached
    with pytest.raises(UserError, match="token losses of other seeds of rare"):
        StudyAnalysis(made)
    for _ in range(2):
        add_result(made, result, nll)
        after = read_token_nll(made)["rare"]
        assert after.seeds.tolist() == [0, 1, 2, 3]
        assert after.total == pytest.approx(before.total + nll.total)
        assert StudyAnalysis(made).groups["rare"].losses == {
            0: 1 + NOISE[3, 0],
            1: 1 + NOISE[3, 1],
            2: 1 + NOISE[3, 2],
            3: 2,
        }
        assert after.mean.mean() == pytest.approx(StudyAnalysis(made).groups["rare"].mean, abs=1e-3)


@pytest.mark.parametrize(
    ("loads", "layers"),
    [("0_0 0_1 1_0 1_1", ["0", "1"]), ("0_max 0_min 2_max 2_min", ["0", "2"]), ("max min", ["max", "min"])],
)
def test_an_expert_with_twice_its_share_is_drawn_as_two_in_its_row(
    loads: str, layers: list[str], tmp_path: Path
) -> None:
    """With many experts, their extremes are drawn instead. A dense run beside it has no such columns."""
    result, nll = result_of("sparse", 0, 1.0, "-c moe")
    first, *others = (f"moe/load_{name}" for name in loads.split())
    row = {"split": "train", first: "0.5", **dict.fromkeys(others, "0.25")}
    result.rows[:] = [{"step": step, **row} for step in ("100", "200")]
    runs = [(result, nll), result_of("dense", 0, 1.0)]
    figure = Figure()
    assert plot_experts(StudyAnalysis(make_study(tmp_path, runs, runs={"sparse": "-c moe", "dense": ""})), figure)
    panel = figure.axes[0]
    assert panel.collections[0].get_array().tolist() == [[2, 2], *[[1, 1] for _ in others]]
    assert [label.get_text() for label in panel.get_yticklabels()] == layers


def test_experts_of_a_run_too_short_to_log_them_are_not_drawn(tmp_path: Path) -> None:
    result, nll = result_of("sparse", 0, 1.0, "-c moe")
    result.rows[:] = [row for row in result.rows if row["split"] != "train"]
    make_study(tmp_path, [(result, nll)], runs={"sparse": "-c moe"})
    assert not plot_experts(StudyAnalysis(tmp_path), Figure())


def test_baselines_of_another_text_are_not_shown(made: Path) -> None:
    assert StudyAnalysis(made).baselines
    baselines = json.loads((made / "baselines.json").read_text())
    for other in ({"data_sha256": "e" * 64}, {"split_basis": "t" * 64}, {"train_frac": 0.8}):
        (made / "baselines.json").write_text(json.dumps(baselines | other))
        assert not StudyAnalysis(made).baselines


def test_a_curve_ends_with_its_longest_seed(made: Path) -> None:
    """At each point it is the mean of the seeds that still train there; at the end there is one."""
    more = [{"step": step, "split": "val", "val/nats_per_char": "1.1"} for step in ("400", "800")]
    change(made, dense_3=lambda result: result.rows.extend(more))
    figure = Figure()
    assert plot_curves(StudyAnalysis(made), figure)
    xy = next(np.array(x.get_xydata()) for x in figure.axes[0].lines if str(x.get_label()).startswith("dense"))
    assert xy[-1].tolist() == [800 * 2048, 1.1]
    assert xy[0].tolist() == [100 * 2048, pytest.approx(1.75 + NOISE[0].mean())]


def test_a_plot_without_data_is_removed(tmp_path: Path) -> None:
    """One evaluation is not a curve."""
    result, nll = result_of("a", 0, 1.0)
    result.rows[:] = [row for row in result.rows if row["step"] != "100"]
    make_study(tmp_path, [(result, nll)], runs={"a": ""})
    (tmp_path / "curves.png").write_bytes(b"an old plot")
    assert list(draw_plots(StudyAnalysis(tmp_path))) == ["positions.png"]
    assert not (tmp_path / "curves.png").exists()


def test_large_numbers_have_three_digits() -> None:
    assert [*map(format_large, (7, 999, 999_936, 1_113_600, 2.38e14))] == ["7", "999", "1 M", "1.11 M", "238 T"]


def test_a_number_changed_by_hand_is_found(made: Path) -> None:
    text = render_report(StudyAnalysis(made), [])
    assert agrees(made, text)
    numbers = [match for match in re.finditer(r"\d", text) if "|" in text[text.rfind("\n", 0, match.start()) :][:3]]
    for match in numbers[:: len(numbers) // 3]:
        other = str((int(match[0]) + 1) % 10)
        assert not agrees(made, text[: match.start()] + other + text[match.end() :])
    change(made, rare_1=lambda result: result.summary.update(tokens_seen=909_600))
    assert not agrees(made, text)


def test_both_estimators_of_a_run_stand_side_by_side(tmp_path: Path) -> None:
    both = "--data.eval_mode both"
    runs = [
        result_of(
            "a",
            seed,
            1 + seed**2 / 100,
            both,
            best_val=1.0,
            full_val_at_best=1.2 + seed,
            expected_estimate=1.01 + seed,
            best_full_val=1.1,
            best_full_step=90,
        )
        for seed in range(3)
    ]
    runs += [result_of("b", seed, 1.25 + seed / 100, "--data.eval_mode sampled") for seed in range(3)]
    names = {"runs": dict.fromkeys("ab", ""), "comparisons": ["a - b"]}
    text = render_report(StudyAnalysis(make_study(tmp_path / "one", runs, **names)), [])
    table = text[text.index("## Two estimators") : text.index("## Differences")].strip().splitlines()
    assert table[-1] == "| `a` | 1.0000 | 2.0100 | 2.2000 | 200 | 1.1000 | 90 |", "and no row of b"
    del runs[0][0].summary["expected_estimate"]
    text_of_older = render_report(StudyAnalysis(make_study(tmp_path / "older", runs, **names)), [])
    assert "| `a` | 1.0000 |  | 2.2000 |" in text_of_older
    assert "character estimated from `eval_iters` random batches of the validation split at the best" in text
    assert "-0.2433" in text[text.index("## Differences") :], "the same estimator chose both"
    runs = [*runs[:3], *(result_of("b", seed, 1.25 + seed / 100) for seed in range(3))]
    text = render_report(StudyAnalysis(make_study(tmp_path / "two", runs, **names)), [])
    assert "on the whole validation split or estimated from" in text
    assert "-0.2433" not in text[text.index("## Differences") :]
    text = render_report(StudyAnalysis(make_study(tmp_path / "three", runs[3:], runs={"b": ""})), [])
    assert "## Two estimators" not in text


def test_a_text_of_one_window_has_no_sampling_error(tmp_path: Path) -> None:
    make_study(tmp_path, [result_of("a", 0, 1.0, window_sd=None)], runs={"a": ""})
    assert math.isnan(StudyAnalysis(tmp_path).groups["a"].sampling_error)


def test_a_folder_without_results_is_refused(minigpt: Callable[..., Outcome], tmp_path: Path) -> None:
    for content, message in (
        (None, "name a folder that minigpt study has written"),
        ("runs: {a: ''}", "holds no results"),
    ):
        if content:
            (tmp_path / STUDY_FILE).write_text(content)
        done = minigpt("report", tmp_path)
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert message in done.err
