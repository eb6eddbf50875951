"""What reaches into Lightning or W&B beyond their public interfaces; seen in lightning 2.6.6 and wandb 0.31.0."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger

from minigpt_pl.runtime.paths import home_for
from minigpt_pl.training.wandb_variables import HIDDEN

STEP_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip


def remove_hook(callback: Callback, name: str) -> None:
    """Lightning skips a hook that cannot be called; it calls and times one that does nothing."""
    setattr(callback, name, None)


def set_callbacks(trainer: Any, callbacks: list[Callback]) -> None:
    """Replaces the trainer's callbacks, without their empty hooks of a step.

    There is no setter; the attribute is read at each hook.
    """
    for callback in callbacks:
        for name in STEP_HOOKS:
            if getattr(type(callback), name) is getattr(Callback, name):
                remove_hook(callback, name)
    trainer.callbacks = callbacks


def log_completed_steps(trainer: Any) -> None:
    """Makes what is logged during a fit go to the loggers with the number of completed steps.

    Lightning counts one less, and for what an evaluation logs by itself the batches of all evaluations. A metric named
    "step" would correct it too, but ModelCheckpoint would then name files by the last value that was logged.
    """
    connector = trainer._logger_connector
    if "log_metrics" in vars(connector):  # an earlier fit of this trainer
        return
    original = connector.log_metrics

    def log_metrics(metrics: Any, step: int | None = None) -> None:
        fitting = trainer.state.fn == "fit" and "step" not in metrics
        original(metrics, trainer.global_step if fitting else step)

    connector.log_metrics = log_metrics


def step_ended(trainer: Any) -> bool:
    """Whether the micro-batch that has just ended was the last one of its optimizer step."""
    return not trainer.fit_loop._should_accumulate()


def evaluation_follows(trainer: Any) -> bool:
    """Whether Lightning evaluates after the micro-batch that has just ended."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def keep_signal_handlers(trainer: Any) -> None:
    """Keeps the handlers of `runtime.signals` during a fit.

    Lightning's own handlers skip a due evaluation, exit with status 0 or 1, and wait for processes that may be gone.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None


def remove_anonymous(logger: WandbLogger) -> None:
    """Lightning always passes `anonymous` to wandb.init, which warns that it is deprecated."""
    del logger._wandb_init["anonymous"]


@contextmanager
def wandb_environment(run_dir: Path, offline: bool) -> Iterator[None]:
    """W&B's environment variables for one run; afterwards they are as before.

    W&B and Lightning write into os.environ, and the next run in the process would inherit it.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / "wandb").resolve()))  # else tables are copied to the home
    os.environ.update(replaced := home_for((run_dir / "wandb").resolve()))
    if offline:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # it looks up its error server even when offline
    for name in HIDDEN:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        if "HOME" in replaced:
            del os.environ["HOME"]
        os.environ.update(before)
