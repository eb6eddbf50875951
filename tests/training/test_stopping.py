"""What ends a run, and what may change when it resumes."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from support.runs import OFF, SIZES, SMALL, at_micro_batch, differences, eval_steps, interrupt, summary

from minigpt_pl.checkpoint.io import read_checkpoint

Call = Callable[..., Outcome]


@pytest.fixture
def fit(minigpt: Call, tmp_path: Path, text_file: Path) -> Call:
    """fit("name", options ...) starts a run in that directory."""
    return lambda name, *options: minigpt(
        "fit", *SMALL, "--data.path", text_file, "--run_dir", tmp_path / name, *options
    )


@pytest.fixture
def resume(minigpt: Call, tmp_path: Path) -> Call:
    """resume("name", options ...) resumes the run in that directory."""
    return lambda name, *options: minigpt("fit", "--run_dir", tmp_path / name, "--ckpt_path", "last", *options)


@pytest.fixture
def stopped(fit: Call) -> Callable[..., None]:
    """stopped("name", options ...) starts a run and interrupts it in its seventh step."""

    def stop(name: str, *options: object) -> None:
        with at_micro_batch(7, interrupt):
            assert fit(name, *options).status == 130

    return stop


def rows(run_dir: Path, split: str) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def group(run_dir: Path) -> dict[str, Any]:
    """The parameter group of AdamW in last.ckpt."""
    return torch.load(run_dir / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][-1]


PATIENCE = ("--trainer.max_steps", 40, "--early_stopping.min_delta", 100, "--early_stopping.patience")
"""No evaluation after the first one counts as an improvement."""


def test_early_stopping_keeps_its_count_over_a_resume(fit: Call, resume: Call, stopped: Any, tmp_path: Path) -> None:
    assert fit("straight", *PATIENCE, 2).status == 0
    assert summary(tmp_path / "straight")["stop_reason"] == "early_stopping"
    assert summary(tmp_path / "straight")["total_steps"] == 15
    stopped("stopped", *PATIENCE, 2)
    assert resume("stopped").status == 0
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []


def test_a_run_that_ran_out_of_patience_resumes_with_more(fit: Call, resume: Call, tmp_path: Path) -> None:
    fit("straight", *PATIENCE, 3)
    fit("stopped", *PATIENCE, 2)
    assert "--early_stopping.patience MORE" in resume("stopped").out  # with the same patience it stops again at once
    assert summary(tmp_path / "stopped")["total_steps"] == 15
    resumed = resume("stopped", "--early_stopping.patience", 3)
    assert "early_stopping.patience: 2 -> 3\n" in resumed.err
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []


def test_a_run_extended_past_an_unscheduled_evaluation_drops_it(fit: Call, resume: Call, tmp_path: Path) -> None:
    options = ("--samples.every_n_evals", 1, "--early_stopping.min_delta", 100, "--early_stopping.patience", 9)
    options += ("--model.lr_schedule", "constant")  # a cosine depends on max_steps
    fit("straight", *options, "--trainer.max_steps", 20)
    fit("extended", *options, "--trainer.max_steps", 13)
    assert [row["step"] for row in rows(tmp_path / "extended", "val")] == ["5", "10", "13"]
    resume("extended", "--trainer.max_steps", 17)
    assert [row["step"] for row in rows(tmp_path / "extended", "val")] == ["5", "10", "15", "17"]
    assert "trainer.max_steps: 17 -> 20\n" in resume("extended", "--trainer.max_steps", 20).err
    assert differences(tmp_path / "straight", tmp_path / "extended") == []


def test_a_run_at_its_time_limit_resumes_with_more_time(fit: Call, resume: Call, tmp_path: Path) -> None:
    fit("straight")
    assert fit("limited", "--trainer.max_time", "00:00:00:00").status == 0
    result = summary(tmp_path / "limited")
    assert (result["stop_reason"], result["total_steps"]) == ("time_limit", 0)
    assert "--trainer.max_time MORE" in resume("limited").out
    assert resume("limited", "--trainer.max_time", "null").status == 0
    assert differences(tmp_path / "straight", tmp_path / "limited") == []


def test_a_changed_learning_rate_and_decay_reach_the_restored_optimizer(
    resume: Call, stopped: Any, tmp_path: Path
) -> None:
    stopped("run", "--model.lr_schedule", "constant", "--model.lr", 0.002)
    assert group(tmp_path / "run")["lr"] == 0.002
    resumed = resume("run", "--model.lr", 0.0005, "--model.weight_decay", 0.3)
    assert "model.lr: 0.002 -> 0.0005\nmodel.weight_decay: 0.1 -> 0.3\n" in resumed.err
    assert (group(tmp_path / "run")["lr"], group(tmp_path / "run")["weight_decay"]) == (0.0005, 0.3)
    assert float(rows(tmp_path / "run", "train")[-1]["lr"]) == 0.0005


def test_a_changed_interval_and_batch_size_take_effect_at_once(resume: Call, stopped: Any, tmp_path: Path) -> None:
    stopped("run")
    resumed = resume("run", "--data.eval_every", 4, "--data.batch_size", 6)
    assert "data.batch_size: 4 -> 6\ndata.eval_every: 5 -> 4\n" in resumed.err
    assert [row["step"] for row in rows(tmp_path / "run", "val")] == ["5", "8", "12", "16"]
    assert summary(tmp_path / "run")["tokens_seen"] == (7 * 4 + 9 * 6) * 16


def test_a_changed_interval_keeps_the_evaluation_it_resumes_from(fit: Call, resume: Call, tmp_path: Path) -> None:
    with at_micro_batch(10, interrupt):
        fit("run")
    resume("run", "--data.eval_every", 4)
    assert [row["step"] for row in rows(tmp_path / "run", "val")] == ["5", "10", "12", "16"]


def test_changes_are_kept_for_the_next_start(resume: Call, stopped: Any, tmp_path: Path) -> None:
    stopped("run")
    with at_micro_batch(8, interrupt):
        resume("run", "--model.lr", 0.0005)
    assert resume("run").err == ""
    assert summary(tmp_path / "run")["config"]["model"]["init_args"]["lr"] == 0.0005


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (("--model.n_embd", 32), "model.n_embd"),
        (("--model.n_head", 1), "model.n_head"),
        (("--model.block_size", 8), "model.block_size"),
        (("--model.rope_theta", 5), "model.rope_theta"),
        (("--model.n_experts", 2), "model.n_experts"),
        (("--model", "ClassicLM"), "model"),
        (("--data.tokenizer", "bpe"), "data.tokenizer"),
        (("--data.train_frac", 0.8), "data.train_frac"),
        (("--data.split_unit", "tokens"), "data.split_unit"),
        (("--data.bpe_across_lines", "true"), "data.bpe_across_lines"),
        (("--data.bpe_train_on", "all"), "data.bpe_train_on"),
    ],
)
def test_options_that_contradict_the_weights_are_refused_by_name(
    resume: Call, trained: Path, minigpt: Call, option: tuple[object, ...], name: str
) -> None:
    outcome = minigpt("fit", "--ckpt_path", trained / "last.ckpt", *option)
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: --{name} ")
    assert str(trained / "last.ckpt") in outcome.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing in this file writes to."""
    from minigpt_pl.__main__ import main

    home = tmp_path_factory.mktemp("trained")
    (home / "text.txt").write_text("the sea comes in, the sea goes out.\n" * 60, "utf-8")
    options = ("fit", *SMALL, "--data.path", home / "text.txt", "--trainer.max_steps", 1, "--run_dir", home / "run")
    assert main([str(word) for word in options]) == 0
    return home / "run"


def test_another_text_under_the_same_path_is_noticed(
    resume: Call, stopped: Any, tmp_path: Path, text_file: Path
) -> None:
    stopped("run")
    text_file.write_text(text_file.read_text("utf-8").replace("out", "tou"), "utf-8")
    refused = resume("run")
    assert refused.status == 2
    assert str(text_file) in refused.err
    assert "--data.allow_data_change true" in refused.err
    before = summary(tmp_path / "run")["data_sha256"]
    with at_micro_batch(9, interrupt):
        allowed = resume("run", "--data.allow_data_change", "true")
    assert f"data.path {text_file}: it is not the text" in allowed.err
    assert summary(tmp_path / "run")["data_sha256"] != before
    text_file.write_text(text_file.read_text("utf-8").replace("tou", "out"), "utf-8")
    assert resume("run").status == 2  # the option holds for one start


OTHER_EVALS = ("--data.eval_mode", "sampled", "--data.eval_iters", 1)


@pytest.mark.parametrize(
    "changes", [(), OTHER_EVALS, ("--data.eval_mode", "both")], ids=["same evaluations", "other", "another estimator"]
)
def test_best_is_not_compared_with_evaluations_of_another_kind(
    fit: Call, resume: Call, tmp_path: Path, changes: tuple[Any, ...]
) -> None:
    assert fit("run", "--trainer.max_steps", 10).status == 0
    rates = ("--model.lr", 5, "--model.muon_lr", 5, "--trainer.gradient_clip_val", "null")  # the loss only rises
    done = resume("run", "--trainer.max_steps", 20, *rates, *changes)
    assert done.status == 0, done.err
    assert ("best.ckpt and patience start again" in done.err) is bool(changes)
    best = summary(tmp_path / "run")["best_step"]
    assert (best > 10) is bool(changes)
    assert torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)["global_step"] == best


def test_a_line_of_a_sample_that_looks_like_a_header_is_not_one(resume: Call, stopped: Any, tmp_path: Path) -> None:
    stopped("run", "--samples.every_n_evals", 1, "--samples.max_new_tokens", 5)
    samples = tmp_path / "run" / "samples.txt"
    samples.write_text(samples.read_text("utf-8") + "=== step of the dance\n", "utf-8")
    assert resume("run").status == 0
    assert "=== step of the dance\n=== step " in samples.read_text("utf-8")


# Why a run stops.


def test_the_time_limit_stops_a_run_without_an_evaluation(minigpt: Call, tmp_path: Path) -> None:
    words = ("--trainer.max_time", "00:00:00:01", "--trainer.max_steps", 10**6, "--data.eval_every", 10**6)
    done = minigpt("fit", *SIZES, *OFF, *words, "--run_dir", tmp_path / "run")
    assert done.status == 0, done.err
    result = summary(tmp_path / "run")
    assert result["stop_reason"] == "time_limit"
    assert 0 < result["total_steps"] < 10**6
    assert (result["best_val"], result["final_val_loss"], eval_steps(tmp_path / "run")) == (None, None, [])
    assert result["final_train_loss"] > 0
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == result["total_steps"]


STILL = ("--model.lr", 1e-12, "--early_stopping.min_delta", 0.5)
"""Nothing is learned: no evaluation after the first one improves."""


@pytest.mark.parametrize(
    ("patience", "every", "steps", "evals", "reason"),
    [
        (2, 4, 40, [4, 8, 12], "early_stopping"),
        (1, 4, 40, [4, 8], "early_stopping"),
        (2, 4, 12, [4, 8, 12], "early_stopping"),  # at max_steps
        (2, 5, 12, [5, 10, 12], "early_stopping"),  # at max_steps, between multiples of eval_every
        (3, 5, 12, [5, 10, 12], "completed"),
    ],
)
def test_patience_counts_evaluations_without_improvement(
    minigpt: Call, tmp_path: Path, patience: int, every: int, steps: int, evals: list[int], reason: str
) -> None:
    words = ("--early_stopping.patience", patience, "--data.eval_every", every, "--trainer.max_steps", steps)
    assert minigpt("fit", *SIZES, *OFF, *STILL, *words, "--run_dir", tmp_path / "run").status == 0
    result = summary(tmp_path / "run")
    assert eval_steps(tmp_path / "run") == evals
    assert (result["stop_reason"], result["total_steps"]) == (reason, evals[-1])


def test_min_delta_affects_patience_only(minigpt: Call, tmp_path: Path) -> None:
    words = ("--early_stopping.patience", 2, "--early_stopping.min_delta", 10, "--trainer.max_steps", 40)
    assert minigpt("fit", *SIZES, *OFF, *words, "--run_dir", tmp_path / "run").status == 0
    result = summary(tmp_path / "run")
    assert (result["stop_reason"], result["total_steps"], result["best_step"]) == ("early_stopping", 12, 12)


def test_early_stopping_null_never_stops(minigpt: Call, tmp_path: Path) -> None:
    words = (*STILL, "--early_stopping.patience", 1, "--early_stopping", "null")
    assert minigpt("fit", *SIZES, *OFF, *words, "--run_dir", tmp_path / "run").status == 0
    assert summary(tmp_path / "run")["stop_reason"] == "completed"
