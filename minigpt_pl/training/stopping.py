"""What ends a run: no more progress, a signal, time, or its last step.

Every stop lies at the end of a step, after the check that is due there; what is saved then is in `saving`.
"""

import signal
import time
from datetime import timedelta
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from minigpt_pl.runtime import signals
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.callbacks import is_step_boundary, is_unscheduled_eval


@final  # so that its settings stand flat, and the whole may be null
class ValLossEarlyStopping(EarlyStopping):
    """Stops when val/loss no longer falls. `--early_stopping null` never stops.

    Args:
        patience: Checks without improvement before it stops.
        min_delta: A smaller step down is no improvement.
    """

    def __init__(self, patience: int, min_delta: float):
        if patience < 1:
            raise UserError(f"early_stopping.patience is {patience}: it must be at least 1; null never stops")
        if not min_delta >= 0:
            raise UserError(f"early_stopping.min_delta is {min_delta}: it must be 0 or positive")
        super().__init__(
            "val/loss", patience=patience, min_delta=min_delta, check_finite=False, check_on_train_epoch_end=False
        )
        self._before: dict[str, Any] | None = None
        """The count before a check off the grid, which a run that goes on beyond it would not have made."""

    @property
    def state_key(self) -> str:
        return type(self).__name__

    @property
    def patience_exhausted(self) -> bool:
        return self.wait_count >= self.patience

    def _count(self) -> dict[str, Any]:
        return {"wait_count": self.wait_count, "best_score": self.best_score}

    def state_dict(self) -> dict[str, Any]:
        return self._count() | {"before": self._before}  # no patience: the settings have it

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count, self.best_score = state_dict["wait_count"], state_dict["best_score"]
        self._before = state_dict["before"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = self._count() if is_unscheduled_eval(trainer) else None
        super().on_validation_end(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before:
            self.load_state_dict(self._before | {"before": None})
        trainer.should_stop = self.patience_exhausted


class GracefulStop(Callback):
    """Ends a run at the end of a step: after a signal, when its time is up, or at a max_steps off the checks' grid.

    Args:
        max_time: Longest time to train, that before a resume included, or None.

    Attributes:
        reason: Why the run was stopped: interrupted, terminated, time_limit, or None.
    """

    def __init__(self, max_time: timedelta | None):
        self.max_time = max_time
        self.reason: str | None = None
        self._seconds_before = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Time in the fit loop, that before a resume included."""
        return self._seconds_before + (0.0 if self._began is None else time.perf_counter() - self._began)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning's handlers lose a check, leave with 0 or 1, and wait for processes that may be gone; ours stand.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()
        self._look(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not signals.deferring:  # the first last.ckpt is written
            signals.defer(True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_step_boundary(trainer, batch_idx):
            self._look(trainer, pl_module)
            if trainer.global_step >= trainer.max_steps:
                trainer.should_stop = True  # Lightning checks before it stops; on the grid it would do so anyway

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: Any) -> None:
        code = 0
        if signals.pending_signal is not None:
            code = signals.pending_signal
        elif self.max_time is not None and self.seconds >= self.max_time.total_seconds():
            code = -1
        if trainer.world_size > 1:  # all stop after the same step
            codes = trainer.strategy.all_gather(torch.tensor(code, device=pl_module.device)).tolist()
            code = max(codes, key=abs)
        if code and trainer.global_step < trainer.max_steps:
            self.reason = {signal.SIGINT: "interrupted", -1: "time_limit"}.get(code, "terminated")
            pl_module.stop_requested = True
