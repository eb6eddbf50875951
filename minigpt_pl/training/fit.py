"""One fit: what watches over it, where it begins, how it goes on from a checkpoint, and what a failure leaves.

What is parsed and built for every command is in `cli`; what a callback does in the room that it is from.
"""

import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from minigpt_pl.checkpoint.io import WRITE_FAILED_REMEDY, AtomicCheckpointIO, loop_state
from minigpt_pl.checkpoint.run_dir import lock_run_dir
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.atomic_io import METRICS_FILE
from minigpt_pl.runtime.errors import UserError, rank_zero_print
from minigpt_pl.training.callbacks import ProgressBar, StepSeeder, TrainMetrics
from minigpt_pl.training.checkpointing import BestCheckpoint, LastCheckpoint, SaveConfig
from minigpt_pl.training.lit_modules import LanguageModel
from minigpt_pl.training.loggers import ResumableCSVLogger, new_run_id, wandb_run
from minigpt_pl.training.stopping import GracefulStop
from minigpt_pl.training.summary import RunSummary

STEP_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip


def eval_protocol(data: dict[str, Any], text_sha256: str) -> tuple[Any, ...]:
    """What val/loss is of: under another one figures do not compare."""
    mode = data["eval_mode"]
    return text_sha256, mode, data["eval_iters" if mode == "sampled" else "max_eval_tokens"]


def drop_empty_hooks(callback: Callback) -> Callback:
    """The callback, with None for each hook of a step that it leaves empty: Lightning calls and times even those."""
    for hook in STEP_HOOKS:
        if getattr(type(callback), hook) is getattr(Callback, hook):
            setattr(callback, hook, None)
    return callback


class FitRunner:
    """A run, from its first callback to its last.

    Args:
        run_dir: Where it writes.
        resuming: Whether it goes on with the run in there.
        start: The checkpoint that it starts from, or None.
        saved: What that checkpoint holds.
        settings: The whole resolved configuration.
        init: What has been built of it.
    """

    def __init__(
        self,
        run_dir: Path,
        resuming: bool,
        start: Path | None,
        saved: dict[str, Any],
        settings: dict[str, Any],
        init: Any,
    ):
        self.run_dir, self.resuming, self.saved, self.settings, self.init = run_dir, resuming, saved, settings, init
        self.start = start
        self.wandb_id = saved["wandb_id"] if resuming else new_run_id()
        branches = bool(saved) and not resuming
        self.summary = RunSummary(
            settings, str(start) if branches else None, saved["global_step"] if branches else None
        )
        max_time = init.trainer.max_time
        self.stops = GracefulStop(
            None if max_time is None else timedelta(seconds=Timer(max_time).time_remaining() or 0)
        )

    def callbacks(self) -> list[Callback]:
        """Ours, in the order in which they must act."""
        init, place = self.init, str(self.run_dir)
        found: list[Callback | None] = [
            StepSeeder(), TrainMetrics(), self.summary, init.samples, init.early_stopping, self.stops,
        ]  # fmt: skip
        best = BestCheckpoint(place)
        found += [best, LastCheckpoint(place, init.checkpoint.every_n_train_steps, init.checkpoint.every_n_minutes)]
        found += [SaveConfig(self.settings, {"wandb_id": self.wandb_id})]
        found += [ProgressBar(best)] if init.trainer.enable_progress_bar is not False else []
        return [callback for callback in found if callback is not None]

    def trainer_settings(self) -> dict[str, Any]:
        """What the Trainer is told beside the user's settings."""
        return {
            "default_root_dir": str(self.run_dir),
            "max_epochs": 1,
            "max_time": None,
            "check_val_every_n_epoch": None,
            "val_check_interval": self.init.data.eval_every * self.init.trainer.accumulate_grad_batches,
        }

    def run(self, trainer: Any, model: LanguageModel, data: TextDataModule, io: AtomicCheckpointIO) -> None:
        """Trains; nothing is written before.

        Raises:
            InputError: If a branch has nothing left to train, a file cannot be written, or Lightning refuses a setting.
        """
        if self.saved and not self.resuming and self.saved["global_step"] >= trainer.max_steps:
            done = f"{self.start} has done trainer.max_steps {trainer.max_steps} already"
            raise UserError(f"--ckpt_path {done}: give --trainer.max_steps MORE")

        def end_other_processes() -> None:  # that train on other devices: they would wait for this one for ever
            if (launcher := trainer.strategy.launcher) is not None:
                launcher.kill(signal.SIGKILL)

        with (
            lock_run_dir(self.run_dir, self.resuming),
            wandb_run(self.init.wandb, trainer, self.run_dir, self.wandb_id, self.settings) as others,
        ):
            signals.exit_hooks.append(end_other_processes)
            try:
                step = self.saved["global_step"] if self.resuming else 0
                if self.saved:
                    io.prepared = self.resume_state(trainer, data)
                grown = step < trainer.max_steps and self.resuming and self.saved["callbacks"]["RunSummary"]["off_grid"]
                trainer.loggers = [
                    ResumableCSVLogger(self.run_dir / METRICS_FILE, step, drop_check=bool(grown)),
                    *others,
                ]
                if said := data.subsampling_note("val"):
                    rank_zero_print(said)
                trainer.callbacks = [drop_empty_hooks(callback) for callback in trainer.callbacks]
                trainer.fit(model, datamodule=data, ckpt_path=self.init.ckpt_path)
            except BaseException as error:
                end_other_processes()
                if isinstance(error, MisconfigurationException):  # such as a monitor that is none
                    problem = str(error).replace("`", "").split(". ")[0].split("\n")[0]
                    raise UserError(f"{problem}: mend it, and begin again or go on") from error
                if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                    place = error.filename or self.run_dir
                    raise UserError(
                        f"{place} could not be written ({error.strerror}): {WRITE_FAILED_REMEDY}"
                    ) from error
                raise

    def resume_state(self, trainer: Any, data: TextDataModule) -> dict[str, Any]:
        """The checkpoint as Lightning is to restore it."""
        steps = self.saved["global_step"]
        checked = steps % self.init.data.eval_every == 0
        kept = {callback.state_key for callback in trainer.callbacks}
        if not self.resuming:  # a branch counts its own checks; what it has learned from is its parent's
            kept = {TrainMetrics().state_key}
        callbacks = {key: state for key, state in self.saved["callbacks"].items() if key in kept}
        before = self.saved["settings"]["data"], self.saved["TextDataModule"]["text_sha256"]
        if self.resuming and eval_protocol(*before) != eval_protocol(self.settings["data"], data.text_info.sha256):
            rank_zero_print("checks measure something else than before: best.ckpt and patience begin anew")
            for name in ("BestCheckpoint", "ValLossEarlyStopping"):
                callbacks.pop(name, None)
            callbacks["RunSummary"] = callbacks["RunSummary"] | {"best": dict.fromkeys(callbacks["RunSummary"]["best"])}
        loops = loop_state(steps, steps * trainer.accumulate_grad_batches, checked)
        return self.saved | {"loops": loops, "callbacks": callbacks}
