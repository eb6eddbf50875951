"""What a user sees of a running fit: the expected time, the bar, and one line for each evaluation."""

import sys
import time
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from minigpt_pl.training.callbacks import get_callback
from minigpt_pl.training.checkpointing import BestCheckpoint
from minigpt_pl.training.metrics import TrainMetrics
from minigpt_pl.training.patches import remove_hook
from minigpt_pl.training.stopping import GracefulStop

MIN_TIMED_STEPS, MIN_TIMED_SECONDS, MAX_TIMED_SECONDS = 10, 2.0, 10.0
"""What the duration of a run is estimated from: so many steps, or fewer where they are slow."""
MIN_ANNOUNCED_SECONDS = 10.0
"""The duration of a shorter run is not announced."""


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, best and speed on a terminal; the expected time and a line per evaluation anywhere."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20 if sys.stdout.isatty() else 0)
        self._first_step, self._evals, self._announced = 0, 0, False

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.is_enabled:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._announced:
            self._announce(trainer, pl_module, batch[1].numel() * trainer.world_size * trainer.accumulate_grad_batches)
        elif not self.is_enabled:
            remove_hook(self, "on_train_batch_end")

    def _announce(self, trainer: Any, pl_module: Any, tokens_per_step: int) -> None:
        throughput = get_callback(trainer, TrainMetrics).throughput
        enough_seconds = MIN_TIMED_SECONDS if throughput.steps >= MIN_TIMED_STEPS else MAX_TIMED_SECONDS
        if throughput.steps < 2 or throughput.clock() < enough_seconds:
            return
        pl_module.running_means.sums.tolist()  # waits until the device has done these steps
        seconds = time.perf_counter() - throughput.started_at + self.seconds_left(trainer)
        if seconds >= MIN_ANNOUNCED_SECONDS and trainer.is_global_zero:
            steps, speed = trainer.max_steps - self._first_step, tokens_per_step / throughput.seconds_per_step()
            self.print(f"about {format_duration(seconds)} for {steps:,} steps at {speed:,.0f} tokens/s")
        self._announced = True

    def seconds_left(self, trainer: Any) -> float:
        """Rough time to the last step, including evaluations; the time limit may end the run earlier."""
        throughput = get_callback(trainer, TrainMetrics).throughput
        step, last, every = trainer.global_step, trainer.max_steps, trainer.datamodule.config.eval_every
        per_step = throughput.seconds_per_step()
        evals = last // every - step // every + (last % every > 0)
        if self._evals:  # measured, with the saves and samples that follow an evaluation
            per_eval = (time.perf_counter() - throughput.started_at - throughput.clock()) / self._evals
        else:  # a forward pass takes about a third of a step
            per_eval = sum(trainer.num_val_batches) * per_step / trainer.accumulate_grad_batches / 3
        return (last - step) * per_step + evals * per_eval

    def get_metrics(self, trainer: Any, pl_module: LightningModule) -> dict[str, Any]:
        shown, metrics = {}, get_callback(trainer, TrainMetrics).latest
        if metrics:
            shown = {"loss": f"{metrics['train/loss']:.4f}", "tok/s": f"{metrics.get('perf/tokens_per_s', 0):,.0f}"}
        best = get_callback(trainer, BestCheckpoint).best["best_val"]
        return shown | ({"best": f"{best:.4f}"} if best is not None else {})

    def init_validation_tqdm(self) -> Any:
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._evals += 1
        logged, val = get_callback(trainer, TrainMetrics).latest, pl_module.eval_metrics
        train = pl_module.train_metrics()  # the steps since the last log, which may end at this one
        columns = [f"step {trainer.global_step:>5}/{trainer.max_steps}"]
        columns += [f"train/loss {train['train/loss']:.4f}"]
        columns += [f"val/loss {val['val/loss']:.4f}", f"nats/char {val['val/nats_per_char']:.4f}"]
        columns += [f"val/full_loss {val['val/full_loss']:.4f}"] if "val/full_loss" in val else []
        columns += [f"{logged['perf/tokens_per_s']:,.0f} tokens/s"] if "perf/tokens_per_s" in logged else []
        if trainer.global_step < trainer.max_steps and not trainer.should_stop:
            seconds = min(self.seconds_left(trainer), get_callback(trainer, GracefulStop).seconds_left)
            columns += [f"{format_duration(seconds)} left"]
        self.print("  ".join(columns))

    def print(self, *args: Any, **kwargs: Any) -> None:
        with suppress(OSError):  # a run continues when nobody reads its output any more
            if self.train_progress_bar.disable:
                print(*args, flush=True)
            else:
                super().print(*args, **kwargs)


def format_duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
