"""What fit leaves: weights that depend on nothing beside training, and metrics that can be recomputed.

What ends a run is tested in test_stopping, resuming it in tests/integration, forks in tests/checkpoint.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, Outcome
from support.runs import OFF, SIZES, rows_of
from torch.nn.functional import cross_entropy

from minigpt_pl import load_checkpoint
from minigpt_pl.__main__ import main
from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.experiments.results import datamodule_of
from minigpt_pl.training.lit_modules import from_checkpoint
from minigpt_pl.training.patches import STEP_HOOKS

MiniGPT = Callable[..., Outcome]
ALL_FILES = {"config.yaml", "best.ckpt", "last.ckpt", "metrics.csv", "summary.json", "samples.txt", "wandb"}
TRAIN, TEST = 0.4, 0.2  # so that an evaluation reads at least as many windows as the train split has


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text("utf-8"))


def mean_nats(checkpoint: Path, text: str) -> float:
    """Loss of a text as a full evaluation counts it, window by window and without padding."""
    loaded = load_checkpoint(checkpoint)
    ids, size, nats = torch.tensor(loaded.tokenizer.encode(text).tolist()), loaded.model.block_size, 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, size):
            window = ids[start : start + size + 1]
            logits, _ = loaded.model(window[None, :-1])
            nats += cross_entropy(logits[0], window[1:], reduction="sum").item()
    return nats / (len(ids) - 1)


def printed_metrics(out: str) -> dict[str, float]:
    """Metrics that validate and test print."""
    return {name: float(value) for name, value in re.findall(r"^(\w+/\w+)\s+([\d.]+)$", out, re.MULTILINE)}


# Nothing beside training changes it.


@pytest.fixture(scope="module")
def digest_of_plain_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("plain") / "run"
    assert main([str(word) for word in ("fit", *SIZES, *OFF, "--run_dir", run)]) == 0
    return read_checkpoint(run / "last.ckpt")["digest"]


@pytest.mark.parametrize(
    "beside",
    [
        OFF,
        (*OFF, "--data.eval_every", 5),
        (*OFF, "--data.eval_every", 100),
        (*OFF, "--data.eval_mode", "sampled", "--data.eval_iters", 2),
        (*OFF, "--trainer.log_every_n_steps", 1),
        (*OFF, "--trainer.enable_progress_bar", "false"),
        (*OFF, "--data.num_workers", 2),
        (*OFF, "--checkpoint.every_n_train_steps", 1),
        ("--wandb", "null", "--samples.max_new_tokens", 20),
        ("--samples", "null"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_weights_do_not_depend_on_evaluations_logs_saves_or_workers(
    minigpt: MiniGPT, tmp_path: Path, digest_of_plain_run: str, beside: tuple[object, ...]
) -> None:
    done = minigpt("fit", *SIZES, *beside, "--run_dir", tmp_path / "run")
    assert done.status == 0, done.err
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["digest"] == digest_of_plain_run


@pytest.mark.parametrize("other", [("--seed_everything", 1), ("--model.dropout", 0), ("--data.batch_size", 5)], ids=str)
def test_a_different_seed_dropout_or_batch_size_gives_different_weights(
    minigpt: MiniGPT, tmp_path: Path, digest_of_plain_run: str, other: tuple[object, ...]
) -> None:
    assert minigpt("fit", *SIZES, *OFF, *other, "--run_dir", tmp_path / "run").status == 0
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["digest"] != digest_of_plain_run


def test_config_yaml_repeats_a_run(minigpt: MiniGPT, tmp_path: Path, digest_of_plain_run: str) -> None:
    done = minigpt("fit", *SIZES, *OFF, "--run_dir", tmp_path / "one")
    assert done.status == 0
    assert "sample" not in done.out  # OFF has --samples null
    assert minigpt("fit", "-c", tmp_path / "one" / "config.yaml", "--run_dir", tmp_path / "two").status == 0
    assert read_checkpoint(tmp_path / "two" / "last.ckpt")["digest"] == digest_of_plain_run


# What a run writes.


@pytest.fixture(scope="module")
def text() -> str:
    return "".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(80))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[Path, Outcome]:
    """A run with all options on; there is no W&B account, and nobody to answer a question."""
    home = tmp_path_factory.mktemp("finished")
    (home / "text.txt").write_text(text, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(home / "nobody"))
        patch.setattr("builtins.input", lambda *args: pytest.fail("fit asks a question"))
        words = [
            "fit", *SIZES, "--data.max_eval_tokens", 2_000_000, "--samples.max_new_tokens", 20,
            "--samples.prompt", "the sea", "--data.path", home / "text.txt", "--data.train_frac", TRAIN,
            "--data.test_frac", TEST, "--run_dir", home / "run",
        ]  # fmt: skip
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            status = main([str(word) for word in words])
        assert "WANDB_MODE" not in os.environ, "the next run in this process would be offline without the option"
    return home / "run", Outcome(status, out.getvalue(), err.getvalue())


def test_a_run_directory_holds_what_it_should(finished: tuple[Path, Outcome]) -> None:
    run, done = finished
    assert done.status == 0, done.err
    assert {path.name for path in run.iterdir()} == ALL_FILES
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    assert not {"run_dir", "ckpt_path"} & config.keys()
    assert config["trainer"]["max_steps"] == 12
    for name in ("best.ckpt", "last.ckpt"):
        assert read_checkpoint(run / name)["config"] == config
    samples = (run / "samples.txt").read_text("utf-8")
    assert re.findall(r"^=== step (\d+)$", samples, re.MULTILINE) == ["4", "8", "12"]


def test_wandb_stores_metrics_and_config_on_this_machine(finished: tuple[Path, Outcome]) -> None:
    run, _ = finished
    (written,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    stored = written.read_bytes()
    assert written.stem.removeprefix("run-") == read_checkpoint(run / "last.ckpt")["wandb_id"]
    for word in (b"val/nats_per_char", b"train/grad_norm", b"bpe_min_pair_freq", b"gradient_clip_val"):
        assert word in stored


def test_metrics_csv_has_a_row_for_each_log_and_each_evaluation(finished: tuple[Path, Outcome]) -> None:
    run, _ = finished
    rows, summary = rows_of(run), summary_of(run)
    keys = [(int(row["step"]), row["split"]) for row in rows]
    assert keys == [(4, "val"), (5, "train"), (8, "val"), (10, "train"), (12, "train"), (12, "val")]
    for row in rows:
        filled = {name for name, value in row.items() if value} - {"step", "split"}
        val = {"val/loss", "val/nats_per_char", "val/bits_per_byte", "val/perplexity"}
        train = {"train/loss", "train/grad_norm", "lr", "tokens_seen"}
        assert filled - {"perf/tokens_per_s"} == (val if row["split"] == "val" else train)
        if row["split"] == "val":
            loss = float(row["val/loss"])
            assert float(row["val/nats_per_char"]) == pytest.approx(loss)
            assert float(row["val/bits_per_byte"]) == pytest.approx(loss / math.log(2))
            assert float(row["val/perplexity"]) == pytest.approx(math.exp(loss))
        else:
            assert float(row["lr"]) == pytest.approx(
                summary["config"]["model"]["init_args"]["lr"] * int(row["step"]) / 50
            )
            assert int(row["tokens_seen"]) == int(row["step"]) * 4 * 16


def test_summary_json_has_the_metrics_of_the_run(finished: tuple[Path, Outcome], text: str) -> None:
    run, _ = finished
    summary, rows = summary_of(run), rows_of(run)
    assert list(summary) == [
        "best_val", "best_step", "best_nats_per_char", "best_bits_per_byte", "final_train_loss", "final_val_loss",
        "total_steps", "stop_reason", "tokens_seen", "wall_seconds", "tokens_per_s", "params_total", "params_active",
        "seed", "versions", "git_commit", "data_sha256", "data_files", "tokenizer_sha256", "parent", "parent_step",
        "config",
    ]  # fmt: skip
    losses = {int(row["step"]): float(row["val/loss"]) for row in rows if row["split"] == "val"}
    assert summary["best_val"] == min(losses.values())
    assert losses[summary["best_step"]] == summary["best_val"]
    assert summary["final_val_loss"] == losses[12]
    assert summary["best_nats_per_char"] == pytest.approx(summary["best_val"])
    assert summary["best_bits_per_byte"] == pytest.approx(summary["best_val"] / math.log(2))
    assert (summary["total_steps"], summary["stop_reason"], summary["seed"]) == (12, "completed", 1337)
    assert (summary["parent"], summary["parent_step"]) == (None, None)
    assert summary["tokens_seen"] == 12 * 4 * 16
    assert summary["tokens_per_s"] > 0
    assert summary["wall_seconds"] > 0

    train, val = text[: int(TRAIN * len(text))], text[int(TRAIN * len(text)) : int((1 - TEST) * len(text))]
    assert summary["final_train_loss"] == pytest.approx(mean_nats(run / "last.ckpt", train), abs=1e-5)
    assert summary["final_val_loss"] == pytest.approx(mean_nats(run / "last.ckpt", val), abs=1e-5)
    assert summary["best_val"] == pytest.approx(mean_nats(run / "best.ckpt", val), abs=1e-5)

    checkpoint = read_checkpoint(run / "last.ckpt")
    assert summary["data_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert summary["tokenizer_sha256"] == checkpoint["TextDataModule"]["tokenizer_sha256"]
    assert summary["config"] == checkpoint["config"]
    weights = checkpoint["state_dict"].values()
    assert summary["params_total"] == summary["params_active"] == sum(weight.numel() for weight in weights)
    assert summary["versions"]["torch"] == torch.__version__


def test_a_run_ends_with_a_table_and_a_sample(finished: tuple[Path, Outcome]) -> None:
    run, done = finished
    summary = summary_of(run)
    lines = done.out.splitlines()
    for step in (4, 8, 12):
        assert re.search(rf"step +{step}/12 .*val/loss \d\.\d{{4}}", done.out)
    assert f"{summary['best_val']:.4f} nats/token" in done.out
    assert "completed after step 12" in done.out
    assert str(run) in done.out
    sample = done.out.partition("\nA sample from best.ckpt:\n")[2].removesuffix("\n")
    assert sample.startswith("the sea"), lines[-3:]
    assert len(sample) == len("the sea") + 20


def test_active_parameters_exclude_experts_that_a_token_does_not_use(minigpt: MiniGPT, tmp_path: Path) -> None:
    moe = ("-c", "moe", "--model.moe_top_k", 1, "--model.ffn_mult", 2)
    assert minigpt("fit", *moe, *SIZES, *OFF, "--run_dir", tmp_path / "run").status == 0
    summary = summary_of(tmp_path / "run")
    one_expert = 3 * 16 * 32  # gate, up and down of n_embd 16 and twice that
    assert summary["params_total"] - summary["params_active"] == 3 * one_expert
    row = rows_of(tmp_path / "run")[1]
    assert row["split"] == "train"
    assert sum(float(row[f"moe/load_0_{expert}"]) for expert in range(4)) == pytest.approx(1)
    assert 0.9 < float(row["train/aux_loss"]) <= 4


# What validate and test print.


def test_validate_repeats_the_best_evaluation(
    minigpt: MiniGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[Path, Outcome]
) -> None:
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.chdir(tmp_path)
    done = minigpt("validate", "--ckpt_path", run / "best.ckpt", "--data.batch_size", 3)
    assert done.status == 0, done.err
    assert printed_metrics(done.out)["val/loss"] == pytest.approx(summary_of(run)["best_val"], abs=1e-6)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert list(tmp_path.iterdir()) == []


def test_test_scores_the_test_split(minigpt: MiniGPT, finished: tuple[Path, Outcome], text: str) -> None:
    run, _ = finished
    best = ("--ckpt_path", run / "best.ckpt")
    done = minigpt("test", *best)
    expected = mean_nats(run / "best.ckpt", text[int((1 - TEST) * len(text)) :])
    assert printed_metrics(done.out)["test/loss"] == pytest.approx(expected, abs=1e-5)

    done = minigpt("test", *best, "--data.test_frac", 0.1)
    assert [line for line in done.err.splitlines() if "test_frac" in line] == [f"data.test_frac: {TEST} -> 0.1"]
    assert printed_metrics(done.out)["test/loss"] == pytest.approx(
        mean_nats(run / "best.ckpt", text[int(0.9 * len(text)) :]), abs=1e-5
    )

    done = minigpt("test", *best, "--data.test_frac", 0)
    assert (done.status, done.out) == (2, "")
    assert "error: --data.test_frac 0: the text has no test split" in done.err
    done = minigpt("validate", *best, "--data.train_frac", 0.5)
    assert (done.status, done.out) == (2, "")
    assert "error: --data.train_frac 0.5: " in done.err


def test_predict_needs_no_text_and_validate_asks_for_it(minigpt: MiniGPT, tmp_path: Path, text_file: Path) -> None:
    assert minigpt("fit", *SIZES, *OFF, "--data.path", text_file, "--run_dir", tmp_path / "run").status == 0
    best = ("--ckpt_path", tmp_path / "run" / "best.ckpt")
    moved = text_file.rename(tmp_path / "moved.txt")
    done = minigpt("predict", *best, "--sample.prompt", "the sea", "--sample.max_new_tokens", 10)
    assert (done.status, done.out[:7], len(done.out)) == (0, "the sea", 7 + 10 + 1)
    done = minigpt("validate", *best)
    assert (done.status, done.out) == (2, "")
    assert "--data.path" in done.err
    assert minigpt("validate", *best, "--data.path", moved).status == 0


def test_sampled_evaluations_estimate_both_splits(minigpt: MiniGPT, tmp_path: Path) -> None:
    sampled = ("--data.eval_mode", "sampled", "--data.eval_iters", 3)
    assert minigpt("fit", *SIZES, *OFF, *sampled, "--run_dir", tmp_path / "run").status == 0
    evals = [row for row in rows_of(tmp_path / "run") if row["split"] == "val"]
    assert all(float(row["train/eval_loss"]) > 0 for row in evals)
    assert len({row["train/eval_loss"] for row in evals}) == len(evals)

    best, losses = ("--ckpt_path", tmp_path / "run" / "best.ckpt"), {}
    for iters in (3, 4, 400):
        done = minigpt("validate", *best, "--data.eval_iters", iters)
        losses[iters] = printed_metrics(done.out)["val/loss"]
    assert losses[3] == pytest.approx(summary_of(tmp_path / "run")["best_val"], abs=1e-6)
    assert losses[4] != losses[3]
    full = printed_metrics(minigpt("validate", *best, "--data.eval_mode", "full").out)["val/loss"]
    assert losses[400] == pytest.approx(full, abs=0.02)


def test_empty_hooks_are_not_called(minigpt: Callable[..., Outcome], tmp_path: Path) -> None:
    profiler = ("--trainer.profiler", "SimpleProfiler", "--trainer.profiler.dirpath", tmp_path)
    words = (*TINY, "--trainer.max_steps", 2, *profiler, "--trainer.profiler.filename", "calls")
    assert minigpt("fit", *words, "--wandb.offline", True, "--run_dir", tmp_path / "run").status == 0
    (report,) = tmp_path.glob("*calls*")
    called = set(re.findall(r"\[Callback\](\w+)\.(\w+)", report.read_text("utf-8")))
    assert {("TrainMetrics", "on_train_batch_end"), ("StepSeeder", "on_train_batch_start")} <= called
    busy = {callback for callback, hook in called if hook in STEP_HOOKS}
    assert busy == {"StepSeeder", "TrainMetrics", "GracefulStop", "LastCheckpoint", "ProgressBar"}
    assert ("WandbCallback", "on_validation_end") in called
    assert {hook for _, hook in called} & set(STEP_HOOKS) == {"on_train_batch_start", "on_train_batch_end"}
    assert ("RunSummary", "on_train_batch_end") not in called


def test_final_train_loss_has_the_precision_of_the_run(minigpt: Callable[..., Outcome], tmp_path: Path) -> None:
    """The same as val/loss, so that the two compare."""
    run = tmp_path / "run"
    assert minigpt("fit", *TINY, "--trainer.precision", "bf16-mixed", "--run_dir", run).status == 0
    checkpoint = read_checkpoint(run / "last.ckpt")
    model, data = from_checkpoint(checkpoint), datamodule_of(checkpoint["config"])

    def loss() -> float:
        nats, tokens = 0.0, 0
        with torch.no_grad():
            for inputs, targets, counts in data.train_eval_batches():
                nats += model.sequence_nll(inputs, targets).double().sum().item()
                tokens += int(counts[:, 0].sum())
        return nats / tokens

    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss()
    assert json.loads((run / "summary.json").read_text())["final_train_loss"] == rounded != loss()
