"""Lightning's conventions, as a user finds them who knows Lightning's documentation and nothing of this project."""

import csv
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from minigpt_pl import LanguageModel, ModernLM, TextDataModule, exact_training, generate, load_checkpoint
from minigpt_pl.runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*log_every_n_steps.*", "ignore:Checkpoint directory .* exists", "ignore:.*LearningRateMonitor.*"
)
TrainerOf = Callable[..., Trainer]


@pytest.fixture
def data(text_file: Path) -> TextDataModule:
    return TextDataModule(path=str(text_file), block_size=16, batch_size=8, eval_every=1)


def tiny(data: TextDataModule, cls: type[LanguageModel] = ModernLM, **options: Any) -> Any:
    seed_everything(1, verbose=False)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.1, "lr": 0.01, "weight_decay": 0.1}
    return cls(**{**sizes, "vocab_size": data.vocab_size, **options})


@pytest.fixture
def trainer_of(tmp_path: Path) -> TrainerOf:
    """A Trainer that is as a notebook's, but for what is slow or prints."""

    def make(**options: Any) -> Trainer:
        quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
        return Trainer(**{**quiet, **options})

    return make


def weights(model: LightningModule) -> list[Tensor]:
    return list(model.state_dict().values())


def equal(one: LightningModule, other: LightningModule) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def rates_of(trainer_of: TrainerOf, model: LightningModule, data: TextDataModule, *callbacks: Callback) -> list[float]:
    """The learning rate of each of six steps, as it is when the weights change."""

    class Rates(Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.found.append(optimizer.param_groups[-1]["lr"])

    rates = Rates()
    trainer_of(max_steps=6, limit_val_batches=0, callbacks=[*callbacks, rates]).fit(model, data)
    return rates.found


def test_a_csv_logger_gets_losses_rate_and_hyper_parameters(
    trainer_of: TrainerOf, data: TextDataModule, tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path, name="", version="log")
    model = tiny(data)
    trainer = trainer_of(max_steps=6, val_check_interval=3, log_every_n_steps=2, logger=logger)
    trainer.fit(model, data)
    with Path(tmp_path, "log", "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [2, 4, 6]
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [3, 6]
    assert float(rows[-1]["val/loss"]) == pytest.approx(trainer.callback_metrics["val/loss"].item())
    assert [float(row["lr"]) for row in rows if row["lr"]] == pytest.approx([0.01 * step / 50 for step in (2, 4, 6)])
    text = Path(tmp_path, "log", "hparams.yaml").read_text("utf-8")
    assert "n_embd: 16\n" in text
    assert "batch_size: 8\n" in text


def test_a_tensorboard_logger_gets_losses_rate_and_hyper_parameters(
    trainer_of: TrainerOf, data: TextDataModule, tmp_path: Path
) -> None:
    events = import_module("tensorboard.backend.event_processing.event_accumulator")  # typed nowhere
    logger = TensorBoardLogger(tmp_path, name="", version="log")
    trainer_of(max_steps=6, val_check_interval=3, log_every_n_steps=2, logger=logger).fit(tiny(data), data)
    found = events.EventAccumulator(str(tmp_path / "log"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in found.Scalars("val/loss")] == [3, 6]
    assert [event.value for event in found.Scalars("lr")] == pytest.approx([0.01 * step / 50 for step in (2, 4, 6)])
    assert "n_embd: 16\n" in Path(tmp_path, "log", "hparams.yaml").read_text("utf-8")


def test_a_wandb_logger_gets_losses_and_hyper_parameters(
    trainer_of: TrainerOf, data: TextDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    # With `mode` too: W&B reads the variable that offline=True sets once in a process, which other tests have done.
    logger = WandbLogger(save_dir=tmp_path, offline=True, mode="offline")
    trainer_of(max_steps=4, val_check_interval=2, log_every_n_steps=2, logger=logger).fit(tiny(data), data)
    run: Any = logger.experiment
    assert {"train/loss", "val/loss", "lr"} <= set(dict(run.summary))
    assert run.summary["trainer/global_step"] == 4
    assert run.config["n_embd"] == 16
    run.finish()


def test_validate_returns_the_metrics(trainer_of: TrainerOf, data: TextDataModule) -> None:
    model = tiny(data)
    trainer = trainer_of(max_steps=2)
    trainer.fit(model, data)
    (found,) = trainer.validate(model, data, verbose=False)
    assert found == {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert found["val/loss"] == pytest.approx(found["val/nats_per_char"])
    assert 0 < found["val/loss"] < 4


def test_train_loss_and_val_loss_can_be_monitored(trainer_of: TrainerOf, data: TextDataModule, tmp_path: Path) -> None:
    stop = EarlyStopping("train/loss", patience=1, min_delta=100)
    best = ModelCheckpoint(tmp_path, "{step}-{val/loss:.2f}", "val/loss", auto_insert_metric_name=False)
    trainer = trainer_of(max_steps=10, val_check_interval=2, callbacks=[stop, best], enable_checkpointing=True)
    trainer.fit(tiny(data), data)
    assert (trainer.global_step, stop.stopped_epoch) == (4, 0)
    assert trainer.callback_metrics["train/loss"] > 0
    assert Path(best.best_model_path).name == f"4-{trainer.callback_metrics['val/loss']:.2f}.ckpt"


def test_a_second_fit_of_a_model_has_metrics_of_its_own(trainer_of: TrainerOf, data: TextDataModule) -> None:
    model, losses = tiny(data), []
    for _ in range(2):
        trainer = trainer_of(max_steps=8, limit_val_batches=0, log_every_n_steps=8)
        trainer.fit(model, data)
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[1] < losses[0]


def test_an_epoch_reads_the_text_once(trainer_of: TrainerOf, data: TextDataModule) -> None:
    trainer = trainer_of(max_epochs=2)
    trainer.fit(tiny(data), data)
    tokens = len(data.tokens("train"))
    steps = len(trainer.train_dataloader)
    assert steps == pytest.approx(tokens / (8 * 16), rel=0.1)
    assert (trainer.global_step, trainer.current_epoch) == (2 * steps, 2)


def test_a_checkpoint_of_lightning_is_loaded_by_every_way(
    trainer_of: TrainerOf, data: TextDataModule, tmp_path: Path, minigpt: Callable[..., Outcome]
) -> None:
    save = ModelCheckpoint(tmp_path, "plain", save_weights_only=True)
    model = tiny(data, n_embd=32)
    trainer = trainer_of(max_steps=3, callbacks=[save], enable_checkpointing=True)
    trainer.fit(model, data)
    loaded = ModernLM.load_from_checkpoint(save.best_model_path)
    assert equal(loaded, model)
    assert dict(loaded.hparams) == dict(model.hparams)
    assert len(generate(load_checkpoint(save.best_model_path), "line", max_new_tokens=5)[0]) == 5
    (before,) = trainer.validate(model, data, verbose=False)
    outcome = minigpt("validate", "--ckpt_path", save.best_model_path, "--trainer.accelerator", "cpu")
    assert outcome.status == 0
    assert f"{before['val/loss']:.7f}" in outcome.out
    assert minigpt("fit", "--ckpt_path", save.best_model_path, "--run_dir", tmp_path / "fork").status == 2


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
def test_a_checkpoint_of_the_command_line_is_an_ordinary_one(
    trainer_of: TrainerOf, data: TextDataModule, text_file: Path, tmp_path: Path, minigpt: Callable[..., Outcome]
) -> None:
    options = ("-c", "smoke", "--wandb", "null", "--samples", "null", "--trainer.max_steps", 4, "--data.eval_every", 2)
    assert minigpt("fit", *options, "--data.path", text_file, "--run_dir", tmp_path / "run").status == 0
    path = tmp_path / "run" / "best.ckpt"
    model = ModernLM.load_from_checkpoint(path)
    again = TextDataModule(path=str(text_file), block_size=model.hparams.block_size, batch_size=8, eval_every=1)
    (found,) = trainer_of().validate(model, again, verbose=False)
    (same,) = trainer_of().validate(ModernLM(**model.hparams), again, ckpt_path=path, verbose=False)
    assert found == same
    outcome = minigpt("validate", "--ckpt_path", path, "--trainer.accelerator", "cpu")
    assert f"{found['val/loss']:.7f}" in outcome.out


def test_lr_find_sweeps_and_its_suggestion_is_used(trainer_of: TrainerOf, data: TextDataModule) -> None:
    model = tiny(data, optimizer="adamw")
    trainer = trainer_of(max_steps=30)
    finder = Tuner(trainer).lr_find(model, data, min_lr=1e-5, max_lr=1.0, num_training=20, early_stop_threshold=None)
    assert finder is not None
    assert finder.results["lr"][-1] / finder.results["lr"][0] > 1e3
    assert len({round(loss, 3) for loss in finder.results["loss"]}) > 10
    assert model.hparams.lr == finder.suggestion() != 0.01
    assert max(rates_of(trainer_of, model, data)) == pytest.approx(model.hparams.lr * 6 / 50)


def test_scale_batch_size_ends_and_sets_the_batch_size(trainer_of: TrainerOf, data: TextDataModule) -> None:
    model = tiny(data)
    found = Tuner(trainer_of(max_epochs=1)).scale_batch_size(model, data, steps_per_trial=1, max_trials=3, init_val=2)
    assert found == data.batch_size == data.hparams.batch_size == 8
    assert next(iter(data.train_dataloader())).inputs.shape == (8, 16)


def test_gradients_are_clipped_by_value_where_the_trainer_says_so(trainer_of: TrainerOf, data: TextDataModule) -> None:
    def norm_of(algorithm: str) -> tuple[float, float]:
        model = tiny(data)
        trainer = trainer_of(max_steps=1, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
        grads: list[Tensor] = []
        original = model.configure_gradient_clipping

        def watched(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            grads[:] = [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]

        model.configure_gradient_clipping = watched
        trainer.fit(model, data)
        return torch.cat(grads).abs().max().item(), torch.cat(grads).norm().item()

    assert norm_of("value")[0] == pytest.approx(1e-3)
    assert norm_of("value")[1] > 1e-3
    assert norm_of("norm")[1] == pytest.approx(1e-3, rel=1e-4)


def test_overfit_batches_reads_the_same_batches_again(trainer_of: TrainerOf, data: TextDataModule) -> None:
    seen: list[Tensor] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0])

    trainer_of(max_epochs=3, overfit_batches=2, callbacks=[Watch()]).fit(tiny(data), data)
    assert len(seen) == 6
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[5])
    assert not torch.equal(seen[0], seen[1])


def test_predict_returns_lists_of_tokens(trainer_of: TrainerOf, data: TextDataModule) -> None:
    model = tiny(data)
    data.prompts = [data.tokenizer.encode_prompt("line"), data.tokenizer.encode_prompt("the sea")]
    model.sampling.max_new_tokens = 4
    first, second = trainer_of().predict(model, data) or []
    assert [len(sample) for sample in (*first, *second)] == [4, 4]  # type: ignore[arg-type]
    assert len(data.tokenizer.decode(first[0])) == 4  # type: ignore[index]


def test_a_model_can_be_called(data: TextDataModule) -> None:
    logits = tiny(data, zero_init=False).eval()(torch.zeros(2, 5, dtype=torch.long))
    assert logits.shape == (2, 5, data.vocab_size)
    assert logits.std() > 0


def test_a_subclass_chooses_its_own_optimizer(trainer_of: TrainerOf, data: TextDataModule) -> None:
    class MyLM(ModernLM):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.25)

    assert rates_of(trainer_of, tiny(data, MyLM), data) == [0.25] * 6


def test_a_callback_sets_the_rate(trainer_of: TrainerOf, data: TextDataModule) -> None:
    class Rate(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            trainer.optimizers[0].param_groups[-1]["lr"] = 0.125

    assert rates_of(trainer_of, tiny(data), data, Rate()) == [0.125] * 6


def test_a_learning_rate_monitor_shows_the_schedule(
    trainer_of: TrainerOf, data: TextDataModule, tmp_path: Path
) -> None:
    monitor = LearningRateMonitor(logging_interval="step")
    logger = CSVLogger(tmp_path, name="", version="log")
    trainer_of(max_steps=3, log_every_n_steps=1, logger=logger, callbacks=[monitor]).fit(tiny(data), data)
    with Path(tmp_path, "log", "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (name,) = [name for name in rows[0] if name.startswith("lr-") and name.endswith("pg2")]
    assert [float(row[name]) for row in rows if row[name]] == pytest.approx([0.01 * step / 50 for step in (1, 2, 3)])


def test_fast_dev_run_does_one_step_and_writes_nothing(
    trainer_of: TrainerOf, data: TextDataModule, tmp_path: Path
) -> None:
    trainer = trainer_of(fast_dev_run=True, default_root_dir=tmp_path / "none", logger=True, enable_checkpointing=True)
    trainer.fit(tiny(data), data)
    assert trainer.global_step == 1
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()
    assert not (tmp_path / "none").exists()


def test_limits_and_val_check_interval(trainer_of: TrainerOf, data: TextDataModule) -> None:
    evaluated: list[int] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            evaluated.append(trainer.global_step)

    options = {"max_epochs": 2, "limit_train_batches": 8, "limit_val_batches": 1, "val_check_interval": 4}
    trainer = trainer_of(**options, num_sanity_val_steps=0, callbacks=[Watch()])
    model = tiny(data)
    trainer.fit(model, data)
    assert evaluated == [4, 8, 12, 16]
    (limited,) = trainer.validate(model, data, verbose=False)
    (whole,) = trainer_of().validate(model, data, verbose=False)
    assert limited["val/loss"] != whole["val/loss"]


def test_weights_are_averaged(trainer_of: TrainerOf, data: TextDataModule) -> None:
    plain, averaged = tiny(data), tiny(data)
    trainer_of(max_steps=8).fit(plain, data)
    trainer_of(max_steps=8, callbacks=[EMAWeightAveraging(decay=0.9)]).fit(averaged, data)
    assert not equal(plain, averaged)


def test_bars_summaries_and_profilers(
    trainer_of: TrainerOf, data: TextDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [RichProgressBar(), ModelSummary(max_depth=2)]
    options = {"enable_progress_bar": True, "enable_model_summary": True, "profiler": "simple"}
    trainer_of(max_steps=2, callbacks=callbacks, **options).fit(tiny(data), data)
    assert "train/loss" not in capsys.readouterr().err


def test_loaders_of_the_users_own(trainer_of: TrainerOf, data: TextDataModule) -> None:
    ids = torch.randint(data.vocab_size, (12, 17), generator=torch.Generator().manual_seed(1))
    pairs = [(row[:-1], row[1:]) for row in ids]
    model = tiny(data)
    trainer = trainer_of(max_epochs=2)
    trainer.fit(model, DataLoader(pairs, 4, shuffle=True), DataLoader(pairs, 4))
    assert trainer.global_step == 6
    logits = model.eval()(ids[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert "val/nats_per_char" not in trainer.callback_metrics


def test_a_cosine_without_an_end_is_refused(trainer_of: TrainerOf, data: TextDataModule) -> None:
    with pytest.raises(UserError, match="model.lr_schedule cosine: it needs the number of steps"):
        trainer_of(max_steps=-1, max_epochs=-1).fit(tiny(data), data)


@pytest.mark.parametrize(
    "length",
    [{"max_steps": 16, "val_check_interval": 5}, {"max_epochs": 2, "val_check_interval": 0.5},
     {"max_epochs": 3, "accumulate_grad_batches": 2}],
    ids=["steps", "epochs", "accumulated"],
)  # fmt: skip
def test_a_stopped_run_resumes_to_the_bit_with_exact_training(
    length: dict[str, Any], trainer_of: TrainerOf, data: TextDataModule, tmp_path: Path
) -> None:
    class Stop(Callback):
        def __init__(self, step: int):
            self.step = step

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == self.step:
                raise RuntimeError("the cable was pulled")

    def run(name: str, stop: int | None = None, ckpt_path: Path | None = None) -> tuple[LightningModule, Trainer]:
        exact = exact_training(tmp_path / name, every_n_train_steps=3)
        exact["callbacks"] += [] if stop is None else [Stop(stop)]
        model, trainer = tiny(data), trainer_of(**length, **exact, enable_checkpointing=True)
        trainer.fit(model, data, ckpt_path=ckpt_path)
        return model, trainer

    straight, trainer = run("straight")
    for step in {5, 6, trainer.global_step // 2, trainer.global_step - 1}:
        with pytest.raises(RuntimeError, match="cable"):
            run(str(step), stop=step)
        torch.manual_seed(step)
        resumed, again = run(str(step), ckpt_path=tmp_path / str(step) / "last.ckpt")
        assert again.global_step == trainer.global_step
        assert equal(straight, resumed), step
        assert again.checkpoint_callback.best == trainer.checkpoint_callback.best  # type: ignore[union-attr]
