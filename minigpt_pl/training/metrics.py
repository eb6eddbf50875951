"""What a run adds to the training metrics: tokens, speed, their state in a checkpoint, and an end when they diverge.

The metrics themselves come from `language_model`; the files that they are written to are in `loggers`.
"""

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from minigpt_pl.runtime.errors import DivergenceError
from minigpt_pl.training.patches import step_ended


class Throughput:
    """Times training steps; evaluations, saves and the first steps of each start are left out.

    Attributes:
        tokens: Targets of the timed steps, over all starts of the run.
        seconds: Time of these steps.
        steps: Steps since this start, timed or not.
        started_at: Time of the first step's start on the clock of time.perf_counter.
    """

    warmup_steps = 5  # caches, allocators and compilers settle

    def __init__(self) -> None:
        self.tokens, self.seconds, self.steps, self.started_at = 0, 0.0, 0, 0.0
        self._clock, self._resumed_at = 0.0, 0.0
        self._last_update = self._last_log = (0, 0.0)  # tokens seen, clock
        self._first_step_end = 0.0

    def resume(self) -> None:
        if not self._resumed_at:
            self._resumed_at = time.perf_counter()
            self.started_at = self.started_at or self._resumed_at

    def pause(self) -> None:
        self._clock, self._resumed_at = self.clock(), 0.0

    def clock(self) -> float:
        """Seconds of training since this start."""
        return self._clock + (time.perf_counter() - self._resumed_at if self._resumed_at else 0.0)

    def count_step(self, tokens_seen: int) -> None:
        self.steps += 1
        if self.steps == 1:
            self._first_step_end = self.clock()
        elif self.steps == self.warmup_steps:
            self._last_update = self._last_log = (tokens_seen, self.clock())

    def update(self, tokens_seen: int) -> None:
        """Adds the steps since the last update."""
        if self.steps > self.warmup_steps:
            clock = self.clock()
            self.tokens += tokens_seen - self._last_update[0]
            self.seconds += clock - self._last_update[1]
            self._last_update = (tokens_seen, clock)

    def log(self, tokens_seen: int) -> float | None:
        """Tokens per second since the last log, however often a checkpoint was saved in between."""
        self.update(tokens_seen)
        tokens, seconds = (now - then for now, then in zip(self._last_update, self._last_log, strict=True))
        self._last_log = self._last_update
        return tokens / seconds if seconds else None

    def seconds_per_step(self) -> float:
        """Mean over all steps of this start but the first, which may compile."""
        return (self.clock() - self._first_step_end) / max(1, self.steps - 1)


class TrainMetrics(Callback):
    """Adds tokens_seen and the speed to the training metrics; resumes their means exactly; ends a run that diverges.

    Attributes:
        tokens_seen: Targets trained on, including those before a resume.
        latest: The training metrics logged last.
        throughput: The timer of the steps.
    """

    def __init__(self) -> None:
        self.tokens_seen = 0
        self.latest: dict[str, float] = {}
        self.throughput = Throughput()
        self._restored: dict[str, Any] = {}  # from a checkpoint

    @property
    def tokens_per_s(self) -> float | None:
        """Over the whole run; None before any step was timed."""
        return self.throughput.tokens / self.throughput.seconds if self.throughput.seconds else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.on_validation_start(trainer, pl_module)
        self.throughput.update(self.tokens_seen)
        checkpoint["callbacks"][self.state_key] = {
            "tokens_seen": self.tokens_seen,
            "timed_tokens": self.throughput.tokens,
            "timed_seconds": self.throughput.seconds,
        } | pl_module.running_means.state(trainer.strategy)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen = state_dict["tokens_seen"]
        self.throughput.tokens, self.throughput.seconds = state_dict["timed_tokens"], state_dict["timed_seconds"]
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._restored:
            pl_module.running_means.restore(self._restored, trainer.global_rank, trainer.world_size)
            self._restored = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.throughput.resume()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens_seen += batch[1].numel() * trainer.world_size
        if step_ended(trainer):
            self.throughput.count_step(self.tokens_seen)
            if pl_module.log_is_due():
                self._complete(trainer, pl_module.train_metrics())

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not pl_module.is_finite():  # between two logs nothing else looks
            problem = "the loss, the gradient or a weight is not a finite number"
            raise DivergenceError(f"step {trainer.global_step}: {problem}")
        self.throughput.pause()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not math.isfinite(loss := pl_module.finish_evaluation("val")["val/loss"]):  # before any logger sees it
            raise DivergenceError(f"step {trainer.global_step}: val/loss is {loss}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.throughput.pause()
        self.throughput.update(self.tokens_seen)

    def _complete(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        loss, grad_norm = metrics["train/loss"], metrics["train/grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergenceError(f"step {trainer.global_step}: train/loss is {loss}, train/grad_norm is {grad_norm}")
        metrics["tokens_seen"] = self.tokens_seen
        if speed := self.throughput.log(self.tokens_seen):
            metrics["perf/tokens_per_s"] = speed
        self.latest = metrics
