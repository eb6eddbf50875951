"""A run that was stopped and resumed ends bit-exact like the run that was never stopped."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, Outcome
from support.runs import SMALL, at_evaluation, at_micro_batch, before_summary, differences, interrupt, snapshot, summary

Call = Callable[..., Outcome]

KINDS: dict[str, tuple[Any, ...]] = {
    "classic": ("--model", "ClassicLM"),
    "modern": (),
    "moe": ("-c", "moe"),
    "bpe": ("-c", "bpe", "--data.bpe_vocab_size", 80),
    "moe and bpe": ("-c", "moe", "-c", "bpe", "--data.bpe_vocab_size", 80, "--data.eval_every", 8),
    "both": ("--data.eval_mode", "both", "--data.eval_iters", 1, "--model.lr", 5, "--model.muon_lr", 5),  # loss rises
    "adamw": ("-c", "moe", "--model.optimizer", "adamw", "--model.conv_kernel_size", 3),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[tuple[Any, ...], Path]]:
    """Options of a fit, and the directory of that run without a stop; each run is made once."""
    home = tmp_path_factory.mktemp("straight")
    text = home / "text.txt"
    text.write_text("".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(60)), "utf-8")

    def make(minigpt: Call, kind: str, accumulate: int = 1, workers: int = 0) -> tuple[tuple[Any, ...], Path]:
        options = (
            "fit", *SMALL, *KINDS[kind], "--data.path", text,
            "--trainer.accumulate_grad_batches", accumulate, "--data.num_workers", workers,
        )  # fmt: skip
        run_dir = home / f"{kind}-{accumulate}-{workers}"
        if not run_dir.exists():
            assert minigpt(*options, "--run_dir", run_dir).status == 0
        return options, run_dir

    return make


def resume(minigpt: Call, run_dir: Path, *options: object) -> Outcome:
    outcome = minigpt("fit", "--run_dir", run_dir, "--ckpt_path", "last", *options)
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.mark.parametrize(
    ("kind", "accumulate", "workers", "step"),
    [
        ("modern", 1, 0, 1),  # the first
        ("modern", 1, 0, 10),  # where an evaluation is due, which comes before the stop
        ("modern", 1, 0, 15),  # the last but one, between two rows of metrics
        ("classic", 4, 0, 7),
        ("moe and bpe", 1, 2, 7),
        ("both", 1, 0, 12),
    ],
)
def test_a_run_stopped_at_any_step_resumes_bit_exact(
    minigpt: Call, straight: Any, tmp_path: Path, kind: str, accumulate: int, workers: int, step: int
) -> None:
    options, expected = straight(minigpt, kind, accumulate, workers)
    with at_micro_batch(step * accumulate, interrupt):
        assert minigpt(*options, "--run_dir", tmp_path / "run").status == 130
    assert summary(tmp_path / "run")["total_steps"] == step
    resume(minigpt, tmp_path / "run")
    assert differences(expected, tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_resumes_bit_exact_from_every_step(
    minigpt: Call, straight: Any, tmp_path: Path, kind: str, accumulate: int, workers: int
) -> None:
    options, expected = straight(minigpt, kind, accumulate, workers)
    for step in range(1, 16) if workers == 0 else (4, 10):
        run_dir = tmp_path / str(step)
        with at_micro_batch(step * accumulate, interrupt):
            assert minigpt(*options, "--run_dir", run_dir).status == 130
        resume(minigpt, run_dir)
        assert differences(expected, run_dir) == []


def test_a_signal_between_micro_batches_and_in_an_evaluation_waits_for_both(
    minigpt: Call, straight: Any, tmp_path: Path
) -> None:
    options, expected = straight(minigpt, "classic", 4)
    with at_micro_batch(6, interrupt), at_evaluation(5, interrupt):  # the second one lies in the step after the resume
        assert minigpt(*options, "--run_dir", tmp_path / "run").status == 130
    assert summary(tmp_path / "run")["total_steps"] == 2
    with at_evaluation(5, interrupt):
        assert minigpt("fit", "--run_dir", tmp_path / "run", "--ckpt_path", "last").status == 130
    assert summary(tmp_path / "run")["total_steps"] == 5
    assert summary(tmp_path / "run")["final_val_loss"] is not None
    resume(minigpt, tmp_path / "run")
    assert differences(expected, tmp_path / "run") == []


def test_a_closed_terminal_stops_a_run_as_sigterm_does(minigpt: Call, straight: Any, tmp_path: Path) -> None:
    options, expected = straight(minigpt, "modern")
    with at_micro_batch(6, lambda: signal.raise_signal(signal.SIGHUP)):
        assert minigpt(*options, "--run_dir", tmp_path / "run").status == 143
    assert summary(tmp_path / "run")["stop_reason"] == "terminated"
    resume(minigpt, tmp_path / "run")
    assert differences(expected, tmp_path / "run") == []


def test_under_nohup_a_closed_terminal_stops_nothing(minigpt: Call, straight: Any, tmp_path: Path) -> None:
    options, expected = straight(minigpt, "modern")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with at_micro_batch(6, lambda: signal.raise_signal(signal.SIGHUP)):
            assert minigpt(*options, "--run_dir", tmp_path / "run").status == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert differences(expected, tmp_path / "run") == []


def test_a_run_that_is_moved_twice_resumes_twice(
    minigpt: Call, straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, expected = straight(minigpt, "modern")
    with at_micro_batch(6, interrupt):
        assert minigpt(*options, "--run_dir", tmp_path / "here").status == 130
    shutil.move(tmp_path / "here", tmp_path / "there")
    with at_micro_batch(12, interrupt):
        assert minigpt("fit", "--ckpt_path", tmp_path / "there" / "last.ckpt").status == 130
    monkeypatch.chdir(tmp_path)
    shutil.move("there", "elsewhere")
    resume(minigpt, Path("elsewhere"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere"]
    assert differences(expected, tmp_path / "elsewhere") == []


def test_a_killed_run_resumes_bit_exact(minigpt: Call, straight: Any, tmp_path: Path) -> None:
    """SIGKILL leaves the directory as it is at that moment: later rows, a later best, an unfinished evaluation."""
    options, expected = straight(minigpt, "modern")
    run = tmp_path / "run"
    with (
        at_micro_batch(1, snapshot(run, tmp_path / "first")),
        at_evaluation(10, snapshot(run, tmp_path / "evaluation")),
        at_evaluation(16, snapshot(run, tmp_path / "last")),
        before_summary(snapshot(run, tmp_path / "end")),
    ):
        minigpt(*options, "--run_dir", run)
    assert not (tmp_path / "end" / "summary.json").exists()
    for name in ("first", "evaluation", "last", "end"):
        resume(minigpt, tmp_path / name)
        assert differences(expected, tmp_path / name) == []


def test_a_completed_run_is_left_as_it_is(minigpt: Call, straight: Any, tmp_path: Path) -> None:
    _, expected = straight(minigpt, "modern")
    shutil.copytree(expected, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    resumed = resume(minigpt, tmp_path / "run", "--model.lr", 0.5)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert "nothing is left to train" in resumed.out
    assert f"minigpt fit --run_dir {tmp_path / 'run'} --ckpt_path last --trainer.max_steps MORE" in resumed.out


def test_a_resumed_run_is_the_same_one_for_wandb(minigpt: Call, straight: Any, tmp_path: Path) -> None:
    options, _ = straight(minigpt, "modern")
    with at_micro_batch(6, interrupt):
        assert minigpt(*options, "--wandb.offline", "true", "--run_dir", tmp_path / "run").status == 130
    resume(minigpt, tmp_path / "run")
    names = sorted(path.name.split("-")[3] for path in (tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert names == [torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["wandb_id"]] * 2
    assert "wandb_id" not in (tmp_path / "run" / "config.yaml").read_text("utf-8")


def test_weights_do_not_depend_on_when_metrics_and_checkpoints_are_written(
    minigpt: Call, straight: Any, tmp_path: Path
) -> None:
    options, expected = straight(minigpt, "modern")
    changed = ("--trainer.log_every_n_steps", 2, "--checkpoint.every_n_train_steps", 1, "--data.eval_every", 8)
    minigpt(*options, *changed, "--samples.every_n_evals", 1, "--run_dir", tmp_path / "run")
    weights = [line for line in differences(expected, tmp_path / "run") if line.startswith(("last/state", "last/opt"))]
    assert weights == []


def test_each_row_of_the_page_is_a_test() -> None:
    """docs/resume.md lists what a run survives, and the test that shows it."""
    page = (PROJECT / "docs" / "resume.md").read_text("utf-8")
    table = page.partition("## What a run survives")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`([\w/]+)\.py::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (PROJECT / "tests" / f"{file}.py").read_text("utf-8"), test
