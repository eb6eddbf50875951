"""docs/lightning.md: each option of the Trainer and each callback of Lightning works or is refused, as it says."""

import csv
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import PROJECT, Outcome
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.strategies import StrategyRegistry
from support.runs import summary

from minigpt_pl import ModernLM, TextDataModule, exact_training
from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.cli.options import RESERVED
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.monitors import ALWAYS, monitorable
from minigpt_pl.training.refused_callbacks import REFUSED
from minigpt_pl.training.refused_strategies import check_strategy

Fit = Callable[..., Outcome]
PAGE = (PROJECT / "docs" / "lightning.md").read_text("utf-8")
PARTS = re.split("## Strategies.*?## Callbacks", PAGE, flags=re.S)
OPTIONS, CALLBACKS = (dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", part, re.M)) for part in PARTS)


@pytest.fixture
def fit(minigpt: Fit, text_file: Path, tmp_path: Path) -> Fit:
    small = ("-c", "smoke", "--wandb", "null", "--samples", "null", "--model.n_embd", 16, "--model.block_size", 16)
    small += ("--data.batch_size", 4, "--data.eval_every", 3, "--trainer.max_steps", 6, "--trainer.accelerator", "cpu")
    small += ("--trainer.log_every_n_steps", 2, "--data.path", text_file, "--run_dir", tmp_path / "run")
    return lambda *options: minigpt("fit", *small, *options)


def evaluated(tmp_path: Path) -> list[int]:
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["split"] == "val"]


def test_the_page_has_every_option_and_every_callback() -> None:
    assert OPTIONS.keys() == inspect.signature(Trainer).parameters.keys()
    assert CALLBACKS.keys() == set(callbacks.__all__)
    assert {name for name, word in OPTIONS.items() if word == "refused"} == RESERVED.keys()
    refused = {name for name in CALLBACKS if issubclass(getattr(callbacks, name), tuple(REFUSED))}
    assert {name for name, word in CALLBACKS.items() if word == "refused"} == refused
    assert {*OPTIONS.values(), *CALLBACKS.values()} == {"works", "refused"}


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_refused_option_says_why(name: str, fit: Fit, tmp_path: Path) -> None:
    outcome = fit(f"--trainer.{name}", "true")
    assert outcome.status == 2
    assert f"{RESERVED[name][0]}; {RESERVED[name][1]}" in outcome.err
    assert not (tmp_path / "run").exists()


ARGUMENTS: dict[str, list[Any]] = {
    "GradientAccumulationScheduler": ["scheduling", "{0: 2}"],
    "StochasticWeightAveraging": ["swa_lrs", 0.01], "OnExceptionCheckpoint": ["dirpath", "x"],
    "ModelPruning": ["pruning_fn", "l1_unstructured"],
}  # fmt: skip


WITHOUT_ARGUMENTS = ["BatchSizeFinder", "LearningRateFinder", "BackboneFinetuning", "BaseFinetuning", "Timer"]


@pytest.mark.parametrize("name", [*WITHOUT_ARGUMENTS, *ARGUMENTS])
def test_a_refused_callback_says_why(name: str, fit: Fit, tmp_path: Path) -> None:
    argument, value = ARGUMENTS.get(name, ["", ""])
    options = [f"--trainer.callbacks.{argument}", value] if argument else []
    outcome = fit("--trainer.callbacks", name, *options)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert f"--trainer.callbacks {name}" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", StrategyRegistry.available_strategies())
def test_a_strategy_works_or_is_refused_with_its_reason(name: str) -> None:
    works = {"ddp", "single_device", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"}
    if name in works:
        check_strategy(name)
        assert f"`{name}`" in PAGE
        return
    with pytest.raises(UserError, match=f"trainer.strategy {name}: .*; use ddp"):
        check_strategy(name)


def test_a_strategy_that_would_lose_the_run_is_refused_before_anything_is_written(fit: Fit, tmp_path: Path) -> None:
    strategy = "--trainer.strategy"
    for options in (
        [strategy, "ddp_spawn"],
        [strategy, "DDPStrategy", f"{strategy}.start_method", "fork"],
        [strategy, "FSDPStrategy"],
    ):
        outcome = fit(*options)
        assert (outcome.status, outcome.err.count("\n")) == (2, 1)
        assert "use ddp" in outcome.err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [[], ["--trainer.devices", 1], ["--trainer.strategy", "ddp"]])
def test_processes_that_lightning_chooses_by_itself_are_refused_too(
    options: list[Any], fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook, Lightning forks where several devices are asked for."""
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE", True)
    outcome = fit("--trainer.devices", 2, *options)
    if options[:1] == ["--trainer.devices"]:
        assert outcome.status == 0, outcome.err
        return
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert ("trainer.strategy fork: its processes end" in outcome.err) == (not options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint"])
@pytest.mark.parametrize("monitor", ["val/los", "perf/tokens_per_s", "moe/entropy"])
def test_a_monitor_that_no_evaluation_has_is_refused_at_the_start(
    name: str, monitor: str, fit: Fit, tmp_path: Path
) -> None:
    outcome = fit("--trainer.callbacks", name, "--trainer.callbacks.monitor", monitor)
    assert outcome.status == 2
    assert f"trainer.callbacks.{name}.monitor {monitor}: no evaluation has this metric" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["full", "both", "sampled"])
def test_each_metric_of_an_evaluation_can_be_monitored(mode: str, fit: Fit, tmp_path: Path) -> None:
    model = SimpleNamespace(config=SimpleNamespace(n_experts=2))
    name = "--trainer.callbacks"
    for monitor in monitorable(model, mode) - (set(ALWAYS) - {"train/loss", "lr"}):
        options = ("--data.eval_mode", mode, "--data.eval_iters", 2, "--model.n_experts", 2, "--trainer.max_steps", 3)
        outcome = fit(
            name,
            "EarlyStopping",
            f"{name}.monitor",
            monitor,
            *options,
            "--run_dir",
            tmp_path / monitor.replace("/", "-"),
        )
        assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    ("options", "steps", "evals"),
    [
        (["--trainer.limit_train_batches", 4], 4, [3, 4]),
        (["--trainer.max_epochs", 1, "--trainer.limit_train_batches", 0.1], 5, [3, 5]),
        (["--trainer.val_check_interval", 2], 6, [2, 4, 6]),
        (["--trainer.val_check_interval", 0.25, "--trainer.limit_train_batches", 4], 4, [1, 2, 3, 4]),
        (["--trainer.val_check_interval", 4, "--trainer.accumulate_grad_batches", 2], 6, [2, 4, 6]),
        (["--trainer.check_val_every_n_epoch", 2, "--trainer.max_epochs", 3, "--trainer.limit_train_batches", 2], 6,
         [4, 6]),
        (["--trainer.overfit_batches", 1], 6, [3, 6]),
        (["--trainer.num_sanity_val_steps", 2], 6, [3, 6]),
        (["--trainer.limit_val_batches", 0], 6, []),
    ],
)  # fmt: skip
def test_epochs_and_batches_become_steps(
    options: list[Any], steps: int, evals: list[int], fit: Fit, tmp_path: Path
) -> None:
    outcome = fit(*options)
    assert outcome.status == 0, outcome.err
    assert summary(tmp_path / "run")["total_steps"] == steps
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text("utf-8"))
    assert config["trainer"]["max_steps"] == steps
    assert config["trainer"].get("max_epochs") is None
    if evals:
        assert evaluated(tmp_path) == evals


def test_a_run_of_epochs_resumes_and_is_extended_in_steps(fit: Fit, minigpt: Fit, tmp_path: Path) -> None:
    assert fit("--trainer.limit_train_batches", 4).status == 0
    resumed = minigpt("fit", "--run_dir", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", 8)
    assert resumed.status == 0, resumed.err
    assert evaluated(tmp_path) == [3, 6, 8]


def test_a_fast_dev_run_writes_nothing(fit: Fit, tmp_path: Path) -> None:
    outcome = fit("--trainer.fast_dev_run", 2)
    assert outcome.status == 0
    assert outcome.out.endswith("fast_dev_run: 2 steps and an evaluation ran, and nothing was written\n")
    assert not (tmp_path / "run").exists()


def test_limits_change_what_an_evaluation_reads(fit: Fit, minigpt: Fit, tmp_path: Path) -> None:
    assert fit("--data.batch_size", 1, "--trainer.limit_val_batches", 1).status == 0
    limited = summary(tmp_path / "run")["best_val"]
    resumed = minigpt("fit", "--run_dir", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", 7,
                      "--trainer.limit_val_batches", 2)  # fmt: skip
    assert "evaluations measure something else than before" in resumed.err
    assert fit("--data.batch_size", 1, "--run_dir", tmp_path / "whole").status == 0
    assert limited != summary(tmp_path / "whole")["best_val"]


def test_gradients_are_clipped_by_value(fit: Fit, tmp_path: Path) -> None:
    losses = []
    for algorithm in ("norm", "value"):
        run = tmp_path / algorithm
        clip = ("--trainer.gradient_clip_val", 1e-3, "--trainer.gradient_clip_algorithm", algorithm)
        assert fit(*clip, "--run_dir", run, "--model.optimizer", "adamw").status == 0
        losses.append(summary(run)["best_val"])
    assert losses[0] != losses[1]


def test_a_logger_stands_beside_ours(fit: Fit, tmp_path: Path) -> None:
    assert fit("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", tmp_path / "log").status == 0
    (file,) = (tmp_path / "log").rglob("metrics.csv")
    with file.open(newline="") as theirs, (tmp_path / "run" / "metrics.csv").open(newline="") as ours:
        found = {row["step"]: row["train/loss"] for row in csv.DictReader(theirs) if row["train/loss"]}
        expected = {row["step"]: row["train/loss"] for row in csv.DictReader(ours) if row["train/loss"]}
    assert found == expected


def test_early_stopping_of_the_users_own_is_the_stop_reason(fit: Fit, tmp_path: Path) -> None:
    name = "--trainer.callbacks"
    stop = (name, "EarlyStopping", f"{name}.monitor", "val/loss", f"{name}.patience", 1, f"{name}.min_delta", 100)
    assert fit(*stop, "--trainer.max_steps", 30).status == 0
    assert summary(tmp_path / "run")["stop_reason"] == "early_stopping"
    assert summary(tmp_path / "run")["total_steps"] == 6


@pytest.mark.parametrize("monitor", ["train/loss", "train/grad_norm", "lr"])
def test_early_stopping_on_a_training_metric_stops(monitor: str, fit: Fit, tmp_path: Path) -> None:
    """Evaluations come every 3 steps, rows of the training metrics every 2."""
    name = "--trainer.callbacks"
    stop = (name, "EarlyStopping", f"{name}.monitor", monitor, f"{name}.patience", 1, f"{name}.min_delta", 100)
    outcome = fit(*stop, "--trainer.max_steps", 30)
    assert outcome.status == 0, outcome.err
    assert summary(tmp_path / "run")["stop_reason"] == "early_stopping"
    assert evaluated(tmp_path) == [3, 6]


WORKING: dict[str, list[Any]] = {
    "DeviceStatsMonitor": ["cpu_stats", "true"], "ThroughputMonitor": ["batch_size_fn", "builtins.len"],
    "ModelSummary": ["max_depth", 2], "RichModelSummary": [], "WeightAveraging": [], "BasePredictionWriter": [],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*flops_per_batch")
@pytest.mark.parametrize("name", WORKING)
def test_a_callback_works_and_what_it_logs_is_of_the_runs_steps(
    name: str, fit: Fit, minigpt: Fit, tmp_path: Path
) -> None:
    option, run = "--trainer.callbacks", tmp_path / "run"
    given = [option, name]
    if WORKING[name]:
        argument, value = WORKING[name]
        given += [f"{option}.{argument}", value]
    outcome = fit(*given)
    assert outcome.status == 0, outcome.err
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert max(int(row["step"]) for row in rows) == 6
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [2, 4, 6]
    if name.endswith("Monitor"):
        (column,) = {"cpu_percent", "validate/samples"} & {key.rpartition("start/")[2] for key in rows[0]}
        assert any(value for row in rows for key, value in row.items() if key.endswith(column))
    if name in ("ThroughputMonitor", "WeightAveraging"):
        repeated = given if name == "ThroughputMonitor" else []  # a function that a file names is not trusted
        resumed = minigpt("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 8, *repeated)
        assert resumed.status == 0, resumed.err
        assert evaluated(tmp_path) == [3, 6, 8]


@pytest.mark.parametrize("name", ["LearningRateMonitor", "TQDMProgressBar", "RichProgressBar", "SpikeDetection"])
def test_a_single_callback_needs_no_list(name: str, fit: Fit) -> None:
    outcome = fit("--trainer.callbacks", name)
    assert outcome.status == 0, outcome.err


def test_a_checkpoint_callback_of_lightning_makes_its_folder(fit: Fit, tmp_path: Path) -> None:
    name, folder = "--trainer.callbacks", tmp_path / "run" / "every"
    options = [f"{name}.every_n_train_steps", 2, f"{name}.save_top_k", -1, f"{name}.dirpath", folder]
    assert fit(name, "ModelCheckpoint", *options).status == 0
    steps = {path.name: read_checkpoint(path)["global_step"] for path in folder.iterdir()}
    assert steps == {f"epoch=0-step={step}.ckpt": step for step in (2, 4, 6)}


def test_averaged_weights_resume_to_the_bit(fit: Fit, minigpt: Fit, tmp_path: Path) -> None:
    average = ("--trainer.callbacks", "EMAWeightAveraging")
    assert fit(*average, "--trainer.max_steps", 3, "--model.lr_schedule", "constant").status == 0
    resumed = ("--run_dir", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", 6)
    assert minigpt("fit", *resumed).status == 0
    assert fit(*average, "--run_dir", tmp_path / "straight", "--model.lr_schedule", "constant").status == 0
    assert summary(tmp_path / "run")["best_val"] == summary(tmp_path / "straight")["best_val"]


def test_a_summary_and_a_profile_are_printed(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    outcome = fit("--trainer.enable_model_summary", "true", "--trainer.profiler", "simple")
    assert outcome.status == 0
    assert "Trainable params" in outcome.out + caplog.text  # Rich prints it, where it is installed
    assert "Profiler Report" in caplog.text


def test_a_callback_of_the_users_own_is_found_and_only_fit_needs_it(
    fit: Fit, minigpt: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "from lightning.pytorch import Callback\n\n\nclass Mine(Callback):\n    pass\n"
    (tmp_path / "callbacks_of_mine.py").write_text(module, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    assert fit("--trainer.callbacks", "callbacks_of_mine.Mine").status == 0
    monkeypatch.setattr("sys.path", [path for path in sys.path if path != str(tmp_path)])
    del sys.modules["callbacks_of_mine"]
    (tmp_path / "callbacks_of_mine.py").unlink()
    for command in ("validate", "predict"):
        outcome = minigpt(command, "--run_dir", tmp_path / "run", "--ckpt_path", "best")
        assert outcome.status == 0, outcome.err


def test_a_prediction_writer_of_the_users_own_gets_the_tokens(
    fit: Fit, minigpt: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "writers_of_mine.py").write_text(
        "from lightning.pytorch.callbacks import BasePredictionWriter\n\n\n"
        "class Writer(BasePredictionWriter):\n"
        "    def write_on_batch_end(self, trainer, model, prediction, *rest):\n"
        "        print([len(sample) for sample in prediction])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert fit("--trainer.max_steps", 1).status == 0
    start = ("--run_dir", tmp_path / "run", "--ckpt_path", "best", "--trainer.callbacks", "writers_of_mine.Writer")
    outcome = minigpt("predict", *start, "--sample.max_new_tokens", 7, "--sample.num_samples", 2)
    assert (outcome.status, outcome.err) == (0, "")
    assert "[7, 7]" in outcome.out


def test_a_callback_made_of_functions_works_from_python(text_file: Path, tmp_path: Path) -> None:
    ends: list[int] = []
    data = TextDataModule(path=str(text_file), block_size=16, batch_size=2, eval_every=2)
    model = ModernLM(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=data.vocab_size, dropout=0.0, lr=1e-3,
                     weight_decay=0.0)  # fmt: skip
    exact = exact_training(tmp_path / "run")
    mine = callbacks.LambdaCallback(on_train_batch_end=lambda trainer, *rest: ends.append(trainer.global_step))
    exact["callbacks"].append(mine)
    quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    Trainer(max_steps=2, accelerator="cpu", **quiet, **exact).fit(model, datamodule=data)
    assert ends == [1, 2]
