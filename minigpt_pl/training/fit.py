"""One fit: its callbacks, its loggers, where it starts, and how its failures are reported.

Parsing options and building the model and the data are the work of `cli`.
"""

import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.callbacks import Timer, WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from minigpt_pl.checkpoint.io import AtomicCheckpointIO, write_error
from minigpt_pl.checkpoint.run_dir import RunDir
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.atomic_io import METRICS_FILE
from minigpt_pl.runtime.errors import UserError, rank_zero_print
from minigpt_pl.training.averaging import WeightAverage
from minigpt_pl.training.callbacks import StepSeeder
from minigpt_pl.training.checkpointing import BestCheckpoint, LastCheckpoint, SaveConfig
from minigpt_pl.training.distillation import Distillation
from minigpt_pl.training.lit_modules import LanguageModel
from minigpt_pl.training.loggers import ResumableCSVLogger, WandbCallback, choose_run_id, wandb_run
from minigpt_pl.training.metrics import TrainMetrics
from minigpt_pl.training.monitors import check_monitors
from minigpt_pl.training.patches import set_callbacks
from minigpt_pl.training.progress import ProgressBar
from minigpt_pl.training.refused_callbacks import check_callbacks
from minigpt_pl.training.refused_strategies import check_launcher
from minigpt_pl.training.resume import dropped_splits, resume_state
from minigpt_pl.training.stopping import GracefulStop
from minigpt_pl.training.summary import RunSummary
from minigpt_pl.training.tensorboard import RunTensorBoardLogger, TensorBoardSamples, check_tensorboard


def as_list(value: Any) -> list[Any]:
    """What an option holds that takes one object, or several, or none."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


class FitRunner:
    """A run, from building its callbacks to its end.

    Args:
        run_dir: The run directory.
        resuming: Whether the run in it continues.
        start: Path of the checkpoint to start from, or None.
        checkpoint: Contents of that checkpoint, or empty.
        config: The whole resolved configuration.
        init: The objects built from it.
        weights_from: Path and step of the checkpoint whose weights a new run starts from, if it does.
    """

    def __init__(
        self,
        run_dir: Path,
        resuming: bool,
        start: Path | None,
        checkpoint: dict[str, Any],
        config: dict[str, Any],
        init: Any,
        weights_from: tuple[str | None, int | None] = (None, None),
    ):
        self.run_dir, self.resuming, self.start, self.checkpoint = run_dir, resuming, start, checkpoint
        self.config, self.init = config, init
        if init.tensorboard:
            check_tensorboard(run_dir)
        self.wandb_id = choose_run_id(init.wandb, checkpoint["wandb_id"] if resuming else None)
        self.forking = bool(checkpoint) and not resuming
        parent = (str(start), checkpoint["global_step"]) if self.forking else weights_from
        self.summary = RunSummary(config, *parent)
        max_time = init.trainer.max_time
        seconds = None if max_time is None else Timer(max_time).time_remaining()  # it parses DD:HH:MM:SS
        self.stops = GracefulStop(None if seconds is None else timedelta(seconds=seconds))

    def callbacks(self, others: list[Callback]) -> list[Callback]:
        """The user's callbacks and ours, in the order in which they must act."""
        init, run_dir = self.init, str(self.run_dir)
        check_callbacks(others)
        if init.ema_decay is not None:
            if any(isinstance(callback, WeightAveraging) for callback in others):
                remedy = "use one of them"
                raise UserError("a callback averages too", option="ema_decay", value=init.ema_decay, remedy=remedy)
            others = [WeightAverage(init.ema_decay), *others]
        if init.teachers:
            others = [Distillation(as_list(init.teachers), init.teacher_weight), *others]
        if init.trainer.fast_dev_run:
            return [*others, StepSeeder(), TrainMetrics()]
        own_bar = init.trainer.enable_progress_bar is False or any(isinstance(c, LightningBar) for c in others)
        callbacks = [
            StepSeeder(), self.stops, TrainMetrics(), self.summary, init.samples, init.early_stopping,
            BestCheckpoint(run_dir),
            LastCheckpoint(run_dir, init.checkpoint.every_n_train_steps, init.checkpoint.every_n_minutes),
            SaveConfig(self.config, self.wandb_id),
            None if own_bar else ProgressBar(),
        ]  # fmt: skip
        return [*others, *(callback for callback in callbacks if callback is not None)]

    def trainer_options(self) -> dict[str, Any]:
        """Options of the Trainer that the user does not choose."""
        chosen = self.init.trainer
        defaults = {"num_sanity_val_steps": 0, "enable_model_summary": False}
        return {name: value for name, value in defaults.items() if chosen[name] is None} | {
            "default_root_dir": str(self.run_dir),
            "max_epochs": -1,
            "max_time": None,
            "check_val_every_n_epoch": None,
            "val_check_interval": self.init.data.config.eval_every * self.init.trainer.accumulate_grad_batches,
        }

    def run(
        self, trainer: Any, model: LanguageModel, data: TextDataModule, io: AtomicCheckpointIO, note: str = ""
    ) -> None:
        """Trains, and prints `note` when nothing stands in the way any more. Nothing is written before.

        Raises:
            UserError: If a fork has nothing left to train, a file cannot be written, or Lightning refuses an option.
        """
        check_launcher(trainer)
        check_monitors(trainer.callbacks, model, data.config.eval_mode)
        step = self.checkpoint.get("global_step", 0)
        if self.forking and step >= trainer.max_steps:
            problem = f"it has done all of trainer.max_steps {trainer.max_steps} already"
            remedy = "use a larger --trainer.max_steps"
            raise UserError(problem, option="ckpt_path", value=self.start, remedy=remedy)

        def end_other_processes() -> None:  # those of the other devices would wait for this one forever
            if (launcher := trainer.strategy.launcher) is not None:
                launcher.kill(signal.SIGKILL)

        wandb_config = self.init.wandb if trainer.is_global_zero else None
        with (
            RunDir(self.run_dir, self.resuming).lock(),
            wandb_run(wandb_config, self.run_dir, self.wandb_id, self.config) as wandb_logger,
        ):
            signals.exit_hooks.append(end_other_processes)
            try:
                if self.checkpoint:
                    io.prepared = resume_state(
                        self.checkpoint, self.resuming, trainer, self.config, data.text_stats.sha256
                    )
                rank_zero_print(note, data.subsampling_note("val"))
                extra: list[Callback] = [WandbCallback(wandb_logger)] if wandb_logger else []
                if trainer.is_global_zero:
                    dropped = dropped_splits(self.checkpoint, trainer.max_steps) if self.resuming else []
                    csv = ResumableCSVLogger(self.run_dir / METRICS_FILE, step if self.resuming else 0, dropped)
                    trainer.loggers = [csv, *([wandb_logger] if wandb_logger else [])]
                    if self.init.tensorboard:
                        tensorboard = RunTensorBoardLogger(self.run_dir, csv.rows)
                        trainer.loggers += [tensorboard]
                        extra += [TensorBoardSamples(tensorboard)]
                    trainer.loggers += [one for one in as_list(self.init.trainer.logger) if isinstance(one, Logger)]
                set_callbacks(trainer, [*trainer.callbacks, *extra])
                trainer.fit(model, datamodule=data, ckpt_path=self.init.ckpt_path)
            except BaseException as error:
                end_other_processes()
                if signals.pending_signal is not None and trainer.world_size > 1:
                    # A second signal has ended another process at once: this one fails only because it waits for it.
                    signals.exit_now(signals.pending_signal)
                no_metric = isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on")
                if no_metric or isinstance(error, (MisconfigurationException, ModuleNotFoundError)):
                    problem = str(error).replace("`", "").split(". ")[0].split("\n")[0]
                    raise UserError(problem, remedy="correct it, and start again or resume") from error
                if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                    raise write_error(error.filename or self.run_dir, error) from error
                raise
