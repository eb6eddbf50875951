"""What happens beside the training loop: dropout's seeds, figures, the bar.

What ends a run is in `stopping`, what saves it in `saving`, text that a model writes in `samples`; where figures are
written is in `loggers`.
"""

import math
import sys
import time
from contextlib import suppress
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar

from minigpt_pl.runtime.errors import DivergenceError
from minigpt_pl.runtime.seeding import derive_seed

Found = TypeVar("Found", bound=Callback)


def get_callback(trainer: Any, kind: type[Found]) -> Found:
    """The trainer's callback of a kind."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def is_step_boundary(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch was the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def eval_due(trainer: Any) -> bool:
    """Whether a check belongs to the step just completed: one on the grid, or the last one."""
    return trainer.global_step % trainer.datamodule.eval_every == 0 or trainer.should_stop


def is_unscheduled_eval(trainer: Any) -> bool:
    """Whether no check would be due at this step if the run were longer."""
    return trainer.global_step % trainer.datamodule.eval_every != 0


class StepSeeder(Callback):
    """Makes dropout a pure function of (seed, step, micro-batch, rank): a resumed run draws the same masks."""

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        micro = batch_idx % trainer.accumulate_grad_batches
        seed = derive_seed(trainer.datamodule.seed, "dropout", trainer.global_step, micro, trainer.global_rank, size=7)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack each time, for devices not there
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif pl_module.device.type == "mps":
            torch.mps.manual_seed(seed)


class Timer:
    """Seconds between each start and the stop that follows; starting or stopping twice does nothing."""

    def __init__(self) -> None:
        self._total, self._since = 0.0, 0.0

    def start(self) -> None:
        self._since = self._since or time.perf_counter()

    def stop(self) -> None:
        self._total, self._since = self.read(), 0.0

    def read(self) -> float:
        return self._total + (time.perf_counter() - self._since if self._since else 0.0)


class TrainMetrics(Callback):
    """Logs the training figures every log_every_n_steps steps, and each check's; goes on with finite numbers only.

    Attributes:
        tokens_seen: Targets trained on, those before a resume included.
        latest: The figures logged last.
        timed_tokens: Of tokens_seen, those whose time was taken: all but the first steps of each start.
        timed_seconds: What they took, without checks and saves.
    """

    warmup_steps = 5  # caches, allocators and compilers settle

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.tokens_seen = self.timed_tokens = 0
        self.timed_seconds = 0.0
        self._watch = Timer()
        self._mark = (0, 0.0)
        self._steps_here = 0
        self._since_log = [0, 0]  # micro-batches, steps
        self._restored_sums: list[list[float]] = []  # each process's, of a checkpoint

    @property
    def tokens_per_s(self) -> float | None:
        """Over the whole run; None before any step was timed."""
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if not pl_module.is_finite():
            raise DivergenceError(
                f"step {trainer.global_step}: the loss, the gradient or a weight is not a finite number"
            )
        self._watch.stop()
        self._settle()
        checkpoint["callbacks"][self.state_key] = {
            "tokens_seen": self.tokens_seen,
            "timed_tokens": self.timed_tokens,
            "timed_seconds": self.timed_seconds,
            "since_log": list(self._since_log),
            "running_sums": trainer.strategy.all_gather(pl_module.running_sums)
            .view(-1, len(pl_module.running_sums))
            .tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen, self.timed_tokens = state_dict["tokens_seen"], state_dict["timed_tokens"]
        self.timed_seconds = state_dict["timed_seconds"]
        self._since_log, self._restored_sums = list(state_dict["since_log"]), state_dict["running_sums"]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._restored_sums:
            sums = torch.tensor(self._restored_sums)
            mine = sums[trainer.global_rank] if len(sums) == trainer.world_size else sums.mean(0)
            pl_module.running_sums.copy_(mine)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._watch.start()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._watch.stop()
        if not pl_module.is_finite():
            raise DivergenceError(
                f"step {trainer.global_step}: the loss, the gradient or a weight is not a finite number"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not math.isfinite(pl_module.eval_metrics["val/loss"]):
            raise DivergenceError(f"step {trainer.global_step}: val/loss is {pl_module.eval_metrics['val/loss']}")
        log_metrics(trainer, pl_module.eval_metrics)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens_seen += batch[1].numel() * trainer.world_size
        self._since_log[0] += 1
        if not is_step_boundary(trainer, batch_idx):
            return
        self._since_log[1] += 1
        self._steps_here += 1
        if self._steps_here == self.warmup_steps:
            self._mark = (self.tokens_seen, self._watch.read())
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._watch.stop()
        self._settle()

    def _settle(self) -> float | None:
        """Adds what was timed since the last call; returns its speed in tokens per second."""
        if self._steps_here <= self.warmup_steps:
            return None
        now = (self.tokens_seen, self._watch.read())
        tokens, seconds = now[0] - self._mark[0], now[1] - self._mark[1]
        self.timed_tokens += tokens
        self.timed_seconds += seconds
        self._mark = now
        return tokens / seconds if seconds else None

    def _log(self, trainer: Trainer, pl_module: Any) -> None:
        sums = trainer.strategy.reduce(pl_module.running_sums.clone(), reduce_op="mean")
        batches, steps = self._since_log
        loss, aux, norm = (sums / sums.new_tensor([batches, batches, steps])).tolist()  # the one wait between two logs
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergenceError(f"step {trainer.global_step}: train/loss is {loss}, train/grad_norm is {norm}")
        self.latest = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "lr": trainer.optimizers[0].param_groups[-1]["lr"],  # with Muon too those that have model.lr are last
            "tokens_seen": self.tokens_seen,
        }
        if speed := self._settle():
            self.latest["perf/tokens_per_s"] = speed
        if figures := pl_module.extra_metrics():
            self.latest |= {"train/aux_loss": aux} | figures
        pl_module.running_sums.zero_()
        self._since_log = [0, 0]
        log_metrics(trainer, self.latest)


def log_metrics(trainer: Trainer, figures: dict[str, float]) -> None:
    """Hands figures to every logger under the number of completed steps (Lightning's own is one less)."""
    for logger in trainer.loggers:
        logger.log_metrics(figures, trainer.global_step)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, best and speed on a terminal, and one line a check anywhere.

    Args:
        best: Keeps the best checkpoint.
    """

    def __init__(self, best: ModelCheckpoint) -> None:
        super().__init__(refresh_rate=20 if sys.stdout.isatty() else 0)
        self.best = best
        if not self.is_enabled:
            self.on_train_batch_end = None  # type: ignore[assignment, method-assign]  # as `without_idle_hooks` does

    def get_metrics(self, trainer: Any, pl_module: LightningModule) -> dict[str, Any]:
        shown, figures = {}, get_callback(trainer, TrainMetrics).latest
        if figures:
            shown = {"loss": f"{figures['train/loss']:.4f}", "tok/s": f"{figures.get('perf/tokens_per_s', 0):,.0f}"}
        best = self.best.best_model_score
        return shown | ({"best": f"{best:.4f}"} if best is not None else {})

    def init_validation_tqdm(self) -> Any:
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        figures, check = get_callback(trainer, TrainMetrics).latest, pl_module.eval_metrics
        line = f"step {trainer.global_step:>5}/{trainer.max_steps}"
        line += f"  train/loss {figures['train/loss']:.4f}" if figures else ""
        line += f"  val/loss {check['val/loss']:.4f}  nats/char {check['val/nats_per_char']:.4f}"
        line += f"  {figures['perf/tokens_per_s']:,.0f} tokens/s" if "perf/tokens_per_s" in figures else ""
        self.print(line)

    def print(self, *args: Any, **kwargs: Any) -> None:
        with suppress(OSError):  # a run outlives whoever reads what it prints
            if self.train_progress_bar.disable:
                print(*args, flush=True)
            else:
                super().print(*args, **kwargs)
