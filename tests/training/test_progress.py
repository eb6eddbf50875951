"""What a user sees of a running fit: the expected time, and the time left after each evaluation."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Outcome
from support.runs import OFF, SIZES

from minigpt_pl.training import progress
from minigpt_pl.training.metrics import TrainMetrics


def test_the_expected_time_and_the_time_left_are_printed(
    minigpt: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "MIN_TIMED_SECONDS", 0)
    short = minigpt("fit", *SIZES, *OFF, "--run_dir", tmp_path / "short")
    assert "about" not in short.out, "a run of less than a second"
    monkeypatch.setattr(progress, "MIN_ANNOUNCED_SECONDS", 0)
    done = minigpt("fit", *SIZES, *OFF, "--run_dir", tmp_path / "run")
    lines = done.out.splitlines()
    assert len(re.findall(r"^about \d+ s for 12 steps at [\d,]+ tokens/s$", done.out, re.MULTILINE)) == 1
    evals = [line for line in lines if line.startswith("step")]
    assert [bool(re.search(r"  \d+ s left$", line)) for line in evals] == [True, True, False]


@pytest.mark.parametrize(("prompt", "named"), [("Σsea", "'Σ'"), ("é 🌊", "'é' '🌊'"), ("the sea", "")])
def test_characters_of_the_samples_prompt_that_the_text_lacks_are_named(
    prompt: str, named: str, minigpt: Callable[..., Outcome], text_file: Path, tmp_path: Path
) -> None:
    words = ("--samples.every_n_evals", 1, "--samples.max_new_tokens", 3, "--data.path", text_file)
    run = ("--run_dir", tmp_path / "run", "--trainer.max_steps", 1)
    done = minigpt("fit", *SIZES, "--wandb", "null", f"--samples.prompt={prompt}", *words, *run)
    assert done.status == 0, done.err
    line = f"samples.prompt: the text has no {named}; the samples begin without"
    assert (line in done.err.splitlines()) == bool(named)
    assert ("samples.prompt" in done.err) == bool(named)
    left = "".join(c for c in prompt if f"'{c}'" not in named)
    assert (tmp_path / "run" / "samples.txt").read_text("utf-8").startswith(f"=== step 1\n{left}")


def test_the_time_left_counts_steps_and_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, bar = TrainMetrics(), progress.ProgressBar()
    now = [1.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    metrics.throughput.resume()
    for step in range(15):
        now[0] += 1 if step else 10  # the first step takes ten seconds, the others one
        metrics.throughput.count_step(step)
    metrics.throughput.pause()
    now[0] += 6  # evaluations
    data = SimpleNamespace(config=SimpleNamespace(eval_every=10))
    run = {
        "global_step": 15,
        "max_steps": 35,
        "accumulate_grad_batches": 2,
        "num_val_batches": [12],
        "datamodule": data,
    }
    trainer = SimpleNamespace(**run, callbacks=[metrics])
    assert bar.seconds_left(trainer) == pytest.approx(20 + 3 * 12 / 2 / 3)
    bar._evals = 2
    assert bar.seconds_left(trainer) == pytest.approx(20 + 3 * 6 / 2)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (300, "5 min"), (7199, "2 h 0 min"), (9000, "2 h 30 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.format_duration(seconds) == text
