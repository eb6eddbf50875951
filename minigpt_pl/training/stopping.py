"""What ends a run: no more progress, a signal, the time limit, or its last step.

A run stops at the end of a step, after the evaluation that is due there; `checkpointing` saves it then.
"""

import math
import signal
import time
from datetime import timedelta
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from minigpt_pl.runtime import signals
from minigpt_pl.runtime.ranges import NonNegativeFloat, PositiveInt
from minigpt_pl.training.patches import keep_signal_handlers, step_ended


@final  # so that the command line takes its options without init_args, and null for the whole
class ValLossEarlyStopping(EarlyStopping):
    """Stops when val/loss no longer falls. `--early_stopping null` never stops.

    Args:
        patience: Evaluations without improvement before the run stops.
        min_delta: A smaller decrease does not count as an improvement.
    """

    def __init__(self, patience: PositiveInt, min_delta: NonNegativeFloat):
        super().__init__(
            "val/loss", patience=patience, min_delta=min_delta, check_finite=False, check_on_train_epoch_end=False
        )
        self._before_last_eval = self._counts()

    @property
    def state_key(self) -> str:
        return type(self).__name__

    @property
    def patience_exhausted(self) -> bool:
        return self.wait_count >= self.patience

    def _counts(self) -> dict[str, Any]:
        return {"wait_count": self.wait_count, "best_score": self.best_score}

    def state_dict(self) -> dict[str, Any]:
        return self._counts() | {"before_last_eval": self._before_last_eval}  # no patience: it may be changed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count, self.best_score = state_dict["wait_count"], state_dict["best_score"]
        self._before_last_eval = state_dict["before_last_eval"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_last_eval = self._counts()
        super().on_validation_end(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = self.patience_exhausted


class GracefulStop(Callback):
    """Ends a run at the end of a step: after a signal, at the time limit, or at max_steps.

    Args:
        max_time: Longest training time, including the time before a resume, or None.

    Attributes:
        reason: Why the run was stopped early: interrupted, terminated, time_limit, or None.
    """

    def __init__(self, max_time: timedelta | None):
        self.max_seconds = math.inf if max_time is None else max_time.total_seconds()
        self.reason: str | None = None
        self._seconds_before = 0.0
        self._started_at: float | None = None

    @property
    def seconds(self) -> float:
        """Time in the fit loop, including the time before a resume."""
        return self._seconds_before + (0.0 if self._started_at is None else time.perf_counter() - self._started_at)

    @property
    def seconds_left(self) -> float:
        return self.max_seconds - self.seconds

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        keep_signal_handlers(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started_at = time.perf_counter()
        self._check(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not signals.deferring:  # from now on there is a last.ckpt to resume from
            signals.defer(True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if step_ended(trainer):
            self._check(trainer, pl_module)
            if trainer.global_step >= trainer.max_steps:
                trainer.should_stop = True  # makes Lightning evaluate first, also between multiples of eval_every

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: Any) -> None:
        code = signals.pending_signal or (-1 if self.seconds_left <= 0 else 0)
        if trainer.world_size > 1:  # all processes stop after the same step
            codes = trainer.strategy.all_gather(torch.tensor(code, device=pl_module.device)).tolist()
            code = max(codes, key=abs)
        if code and trainer.global_step < trainer.max_steps:
            self.reason = {signal.SIGINT: "interrupted", -1: "time_limit"}.get(code, "terminated")
            pl_module.stop_requested = True
