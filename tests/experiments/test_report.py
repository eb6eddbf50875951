"""The report: what it says follows from the results folder alone, and every committed report says what its results do.

Results are written here as a study would leave them; no model is trained.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import PROJECT, Outcome
from matplotlib.figure import Figure

from minigpt_pl.experiments.analysis import StudyAnalysis
from minigpt_pl.experiments.plots import draw_plots, plot_curves, plot_experts
from minigpt_pl.experiments.report import render_report, short
from minigpt_pl.experiments.results import Result, TokenNLL
from minigpt_pl.experiments.spec import STUDY_FILE, resolve_config

COMMITTED = sorted(path.parent for path in PROJECT.glob(f"docs/results/*/{STUDY_FILE}"))
NOISE = np.random.default_rng(3).normal(0, 0.0025, (4, 8))


def says(folder: Path, text: str) -> bool:
    """Whether a text is what the results in a folder say."""
    pictures = re.findall(r"^!\[\w+\]\((.*)\)$", text, re.MULTILINE)
    return (
        all((folder / name).is_file() for name in pictures) and render_report(StudyAnalysis(folder), pictures) == text
    )


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_a_committed_report_says_what_its_results_do(folder: Path) -> None:
    assert says(folder, (folder / "index.md").read_text("utf-8")), f"python main.py report {folder}"
    for run in (folder / "runs").iterdir():
        assert sum(file.stat().st_size for file in run.iterdir()) <= 150_000, run


def leave(folder: Path, name: str, seed: int, best: float, words: str = "", length: int = 1, **summary: Any) -> None:
    """A results folder with a given figure, of tokens of some length."""
    place = folder / "runs" / f"{name}-{seed}"
    place.mkdir(parents=True)
    settings = resolve_config(f"--model.block_size 128 {words}".split()) | {"seed_everything": seed}
    (place / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    found = {
        "best_nats_per_char": best, "best_step": 200, "total_steps": 200, "stop_reason": "completed",
        "params_total": 1000, "params_active": 1000, "tokens_seen": 409_600, "flops_per_token": 6000,
        "wall_seconds": 90.0, "git_commit": "0123456789", "versions": {"torch": "2.13"}, "machine": "2 CPU cores",
        "data_sha256": "d" * 64, "tokenizer_sha256": "t" * 64, "command": f"minigpt fit --seed_everything {seed}",
    }  # fmt: skip
    (place / "summary.json").write_text(json.dumps(found | summary))
    loads = ",".join(f"moe/load_0_{expert}" for expert in range(4)) if "moe" in words else "lr"
    row = ",".join("0.25" for _ in loads.split(","))
    speeds = ["", 10240, 6400, 5120]  # none at the first log; the last of a machine that slept
    trained = [f"{50 * at},train,,{speed},{row}" for at, speed in enumerate(speeds, 1)]
    checked = [f"100,val,{best + 0.5},,", f"200,val,{best},,"]
    head = f"step,part,val/nats_per_char,perf/tokens_per_s,{loads}"
    (place / "metrics.csv").write_text("\n".join([head, *trained, *checked]) + "\n")
    nats = length * (best + 0.1 * np.sin(np.arange(128 * 50) / 7)).astype(np.float16)
    begins = np.arange(50, dtype=np.int32) * 128 * length + 1
    np.savez_compressed(place / "nats.npz", nats=nats, begins=begins, lengths=np.full(len(nats), length, np.uint8))
    (place / "sample.txt").write_text(f"<{name}> & more\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seeds of each: sparse is five SD lower than dense; wide has other batches, rare three seeds."""
    folder = tmp_path_factory.mktemp("results") / "made"
    for seed in range(8):
        leave(folder, "dense", seed, 1.25 + NOISE[0, seed])
        leave(folder, "sparse", seed, 1.25 - 0.012 + NOISE[1, seed], "-c moe", params_total=3000, params_active=1010)
        leave(folder, "wide", seed, 1.25 + NOISE[2, seed], "--data.batch_size 16", params_total=3000)
        if seed < 3:
            leave(folder, "rare", seed, 1.0 + NOISE[3, seed])
            leave(folder, "unnamed", seed, 1.0)
        leave(
            folder, "pieces", seed, 1.25 + NOISE[3, seed], "--data.tokenizer bpe", length=3, tokenizer_sha256="b" * 64
        )
        leave(folder, "elsewhere", seed, 0.5, "--data.test_frac 0.05")
    named = ["sparse - dense", "wide - dense", "rare - dense", "never - dense", "elsewhere - dense", "pieces - dense"]
    runs = dict.fromkeys(("dense", "sparse", "wide", "rare", "never", "pieces", "elsewhere"), "")
    content = {"description": "A made study.", "runs": runs, "comparisons": named}
    (folder / STUDY_FILE).write_text(yaml.safe_dump(content, sort_keys=False))
    floors = {"unigram": {"nats_per_char": 3.1}, "xz": {"nats_per_char": 1.7}}
    of = {"data_sha256": "d" * 64, "train_frac": 0.9, "test_frac": 0.0}
    (folder / "baselines.json").write_text(json.dumps({**of, "baselines": floors}))
    (folder / "failed.json").write_text(json.dumps({"rare-4": "it diverged"}))
    return folder


def test_the_report_says_what_is_known_of_the_results(made: Path, minigpt: Callable[..., Outcome]) -> None:
    done = minigpt("report", made)
    assert done.status == 0, done.err
    text = (made / "index.md").read_text("utf-8")
    assert says(made, text)
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
    assert row["pieces"][7:9] == ["410 k", "1.23 M"]  # tokens of three characters each
    differences = text[text.index("## Differences") : text.index("## Experts")]
    verdict = dict(re.findall(r"^\| `(.*?)` .*\*\*(.*)\*\* \|", differences, re.MULTILINE))
    assert verdict == {
        "sparse - dense": "lower",
        "wide - dense": "no difference found",
        "rare - dense": "cannot tell",
        "never - dense": "cannot tell",
        "elsewhere - dense": "cannot tell",  # of another text
        "pieces - dense": "no difference found",
    }
    assert "`never - dense` | 0 and 8 |" in differences
    assert "**lower** | 3.00 | 1.01 | 1.00 | 1.00 |" in differences
    assert differences.strip().endswith("| 1.00 | 1.00 | 3.00 | 1.00 |")
    assert "8 pairs" in differences
    assert "`wide - dense` | 8 and 8 |" in differences  # other batches are no pairs
    assert "`rare - dense` | 3 pairs |" in differences
    assert "- not run: `never`" in text
    assert "- failed: `rare-4`: it diverged" in text
    assert "the study does not name them: unnamed" in text
    experts = text[text.index("## Experts") : text.index("![curves]")]
    assert f"| as many active | `dense` | {values.mean():.4f} | 3.00 | 1.01 | 1.00 | 1.00 |" in experts
    assert f"| as many in all | `wide` | {1.25 + NOISE[2].mean():.4f} | 1.00 | 1.01 | 1.00 | 1.00 |" in experts
    assert "`pieces`" not in experts  # of other tokens
    assert "What simple methods reach: unigram 3.1000, xz 1.7000." in text
    assert "&lt;sparse&gt; &amp; more" in text
    for path in (path for path in (made / "runs").iterdir() if not path.name.startswith("unnamed")):
        assert f"[{path.name}](runs/{path.name})" in text
        assert f"minigpt fit --seed_everything {Result(path).seed}`" in text
    for name in ("curves", "differences", "experts", "positions"):
        assert (made / f"{name}.png").stat().st_size > 10_000


def test_seeds_and_text_speak_of_the_same_pairs(made: Path, tmp_path: Path) -> None:
    """A seed that only one of two has, and that is far off, is in neither."""
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    leave(folder, "sparse", 8, 9.0, "-c moe")
    found = next(one for one in StudyAnalysis(folder).comparisons if one.name == "sparse - dense")
    assert found.over_seeds.seeds == (8, 8)
    assert found.over_seeds.interval is not None
    assert found.over_text is not None
    assert found.over_text.mean == pytest.approx(found.over_seeds.interval.mean, abs=1e-3)


@pytest.mark.parametrize(
    ("loads", "layers"),
    [("0_0 0_1 1_0 1_1", ["0", "1"]), ("0_max 0_min 2_max 2_min", ["0", "2"]), ("max min", ["max", "min"])],
)
def test_an_expert_of_twice_its_share_stands_in_its_row_as_two(loads: str, layers: list[str], tmp_path: Path) -> None:
    """Where experts are many, their extremes are drawn in their place."""
    leave(tmp_path, "sparse", 0, 1.0, "-c moe")
    names = loads.split()
    table = [",".join(["step", "part", *(f"moe/load_{name}" for name in names)])]
    table += [",".join([step, "train", "0.5", *["0.25" for _ in names[1:]]]) for step in ("100", "200")]
    (tmp_path / "runs" / "sparse-0" / "metrics.csv").write_text("\n".join(table) + "\n")
    (tmp_path / STUDY_FILE).write_text("runs: {sparse: -c moe}\n")
    figure = Figure()
    assert plot_experts(StudyAnalysis(tmp_path), figure)
    panel = figure.axes[0]
    assert panel.collections[0].get_array().tolist() == [[2, 2], *[[1, 1] for _ in names[1:]]]
    assert [label.get_text() for label in panel.get_yticklabels()] == layers


def test_experts_of_a_run_too_short_to_log_them_are_not_drawn(tmp_path: Path) -> None:
    leave(tmp_path, "sparse", 0, 1.0, "-c moe")
    metrics = tmp_path / "runs" / "sparse-0" / "metrics.csv"
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if ",train," not in line))
    (tmp_path / STUDY_FILE).write_text("runs: {sparse: -c moe}\n")
    assert not plot_experts(StudyAnalysis(tmp_path), Figure())


def test_floors_of_another_text_are_not_shown(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    floors = json.loads((folder / "baselines.json").read_text())
    (folder / "baselines.json").write_text(json.dumps(floors | {"data_sha256": "e" * 64}))
    assert StudyAnalysis(made).baselines
    assert not StudyAnalysis(folder).baselines


def test_a_curve_ends_with_its_last_seed(made: Path, tmp_path: Path) -> None:
    """And is there the mean of those that train there, of which there is one."""
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    with (folder / "runs" / "dense-3" / "metrics.csv").open("a") as file:
        file.write("400,val,1.1,\n800,val,1.1,\n")
    figure = Figure()
    assert plot_curves(StudyAnalysis(folder), figure)
    (line,) = (line for line in figure.axes[0].lines if str(line.get_label()).startswith("dense"))
    xy = np.array(line.get_xydata())
    assert xy[-1].tolist() == [800 * 2048, 1.1]
    assert xy[0].tolist() == [100 * 2048, pytest.approx(1.75 + NOISE[0].mean())]


def test_a_picture_that_nothing_is_known_for_any_more_goes(made: Path, tmp_path: Path) -> None:
    """One check makes no curve."""
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    for path in (folder / "runs").glob("*/metrics.csv"):
        path.write_text(re.sub(r"^100,.*\n", "", path.read_text(), flags=re.MULTILINE))
    (folder / "curves.png").write_bytes(b"of before")
    assert "curves.png" not in list(draw_plots(StudyAnalysis(folder)))
    assert not (folder / "curves.png").exists()


def test_large_numbers_have_three_digits() -> None:
    assert [short(number) for number in (7, 999, 999_936, 1_113_600, 2.38e14)] == ["7", "999", "1 M", "1.11 M", "238 T"]


def test_a_number_changed_by_hand_is_found(made: Path, tmp_path: Path, minigpt: Callable[..., Outcome]) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    assert minigpt("report", folder).status == 0
    text = (folder / "index.md").read_text("utf-8")
    numbers = [match for match in re.finditer(r"\d", text) if "|" in text[text.rfind("\n", 0, match.start()) :][:3]]
    for match in numbers[:: len(numbers) // 5]:
        other = str((int(match[0]) + 1) % 10)
        assert not says(folder, text[: match.start()] + other + text[match.end() :])
    summary = folder / "runs" / "rare-1" / "summary.json"
    summary.write_text(summary.read_text().replace('"tokens_seen": 409600', '"tokens_seen": 909600'))
    assert not says(folder, text)


def test_loss_by_position_and_by_character_are_of_the_right_tokens() -> None:
    """Two windows of three targets, of one to three characters; the first token of the part is not scored."""
    scores = TokenNLL(np.float16([1, 2, 3, 4, 6]), np.array([1, 2, 3, 1, 1]), np.int32([2, 8]), window=3)
    found = scores.by_character()
    assert np.isnan(found[:2]).all()
    assert found[2:].tolist() == [1, 1, 1, 1, 1, 1, 4, 6]
    assert scores.by_position().tolist() == [5 / 2, 8 / 3, 1]


def test_a_check_by_random_windows_scatters_as_the_report_says() -> None:
    draw = np.random.default_rng(3)
    lengths = draw.integers(1, 4, 50 * 7 + 3)  # tokens; the last window is a short one
    scores = TokenNLL((lengths * draw.gamma(2, 1, len(lengths))).astype(np.float16), lengths, np.zeros(51, np.int32), 7)
    nats, characters = (x[:350].reshape(50, 7).sum(1) for x in (scores.nats.astype(float), lengths))
    checks = [np.mean((nats / characters)[draw.integers(0, 50, 12)]) for _ in range(20_000)]
    assert scores.sampling_error(12) == pytest.approx(np.std(checks), rel=0.03)
    assert math.isnan(TokenNLL(np.ones(7, np.float16), np.ones(7), np.zeros(1, np.int32), 7).sampling_error(12))


def test_a_folder_without_results_is_refused(minigpt: Callable[..., Outcome], tmp_path: Path) -> None:
    done = minigpt("report", tmp_path)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "name a results folder that minigpt study has written" in done.err
