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

from minigpt_pl import signals
from minigpt_pl.callbacks import step_is_whole
from minigpt_pl.errors import InputError


@final  # so that its settings stand flat, and the whole may be null
class StopEarly(EarlyStopping):
    """Stops when val/loss no longer falls. `--early_stopping null` never stops.

    Args:
        patience: Checks without improvement before it stops.
        min_delta: A smaller step down is no improvement.
    """

    def __init__(self, patience: int, min_delta: float = 0.0):
        if patience < 1:
            raise InputError(f"early_stopping.patience is {patience}: it must be at least 1; null never stops")
        if not min_delta >= 0:
            raise InputError(f"early_stopping.min_delta is {min_delta}: it must be 0 or positive")
        super().__init__(
            "val/loss", patience=patience, min_delta=min_delta, check_finite=False, check_on_train_epoch_end=False
        )
        self.before_last_check: dict[str, Any] | None = None
        """The count before a check at max_steps that lies off the grid; a run that is extended goes back to it."""

    @property
    def state_key(self) -> str:
        return type(self).__name__

    @property
    def has_run_out(self) -> bool:
        return self.wait_count >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"before_last_check": self.before_last_check}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before_last_check = state_dict["before_last_check"]
        super().load_state_dict({**state_dict, "patience": self.patience})  # the settings win over the checkpoint

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        off_grid = trainer.global_step % trainer.datamodule.eval_every != 0
        self.before_last_check = super().state_dict() if off_grid else None
        super().on_validation_end(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.before_last_check and trainer.global_step < trainer.max_steps:
            super().load_state_dict({**self.before_last_check, "patience": self.patience})
        trainer.should_stop = self.has_run_out


class StopTraining(Callback):
    """Ends a run at the end of a step: after a signal, when its time is up, or at a max_steps off the checks' grid.

    Args:
        max_time: Longest time to train, or None.

    Attributes:
        reason: Why the run was stopped: interrupted, terminated, time_limit, or None.
    """

    def __init__(self, max_time: timedelta | None):
        self.max_time = max_time
        self.reason: str | None = None
        self.seconds_before = 0.0
        self._began = 0.0

    def seconds(self) -> float:
        """Time in the fit loop, that before a resume included."""
        return self.seconds_before + (time.perf_counter() - self._began if self._began else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds_before = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not signals.deferring:  # the first last.ckpt is written
            signals.install()  # Lightning has set its own, which lose checks and exit with 0 or 1
            signals.defer(True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if step_is_whole(trainer, batch_idx):
            self._look(trainer, pl_module)
            if trainer.global_step >= trainer.max_steps:
                trainer.should_stop = True  # Lightning checks before it stops; on the grid it would do so anyway

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: Any) -> None:
        code = 0
        if signals.noted is not None:
            code = signals.noted
        elif self.max_time is not None and self.seconds() >= self.max_time.total_seconds():
            code = -1
        if trainer.world_size > 1:  # all stop after the same step
            codes = trainer.strategy.all_gather(torch.tensor(code, device=pl_module.device)).tolist()
            code = max(codes, key=abs)
        reasons = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", -1: "time_limit"}
        if code and trainer.global_step < trainer.max_steps:
            self.reason = reasons[code]
            pl_module.stop_requested = True
