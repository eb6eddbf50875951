"""What a run leaves at its end: summary.json, and a short table for the terminal.

Its values are measured by `language_model`, `metrics` and `checkpointing`; here they are only put together.
"""

import json
import platform
import shlex
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from minigpt_pl.runtime.atomic_io import SUMMARY_FILE, atomic_write
from minigpt_pl.runtime.errors import DivergenceError
from minigpt_pl.runtime.user_classes import user_class_args
from minigpt_pl.training.averaging import averaged_weights
from minigpt_pl.training.by_products import read_summary
from minigpt_pl.training.callbacks import get_callback
from minigpt_pl.training.checkpointing import BestCheckpoint
from minigpt_pl.training.metrics import TrainMetrics
from minigpt_pl.training.stopping import GracefulStop, ValLossEarlyStopping

NORMAL_STOPS = ("completed", "early_stopping", "time_limit")


def git_commit() -> str | None:
    """The commit of the package's checkout, with "-dirty" where files differ from it; None outside of a checkout.

    A repository that only surrounds the package, such as one around a virtual environment, does not track this file.
    """
    tracked = ("ls-files", "--error-unmatch", Path(__file__).name)
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        for args in (tracked, describe):
            done = subprocess.run(
                ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
                start_new_session=True,  # Ctrl-C does not reach it
            )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in ("minigpt_pl", "torch", "lightning", "jsonargparse", "torchmetrics", "tokenizers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the package itself may be a checkout
            found[name] = "not installed"
    return found


def has_stopped(callback: EarlyStopping) -> bool:
    """Whether this callback has ended the run, ours or another one of the user's."""
    if isinstance(callback, ValLossEarlyStopping):
        return callback.patience_exhausted
    return callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED


class RunSummary(Callback):
    """Writes summary.json when the run ends, however it ends.

    Args:
        config: The whole resolved configuration.
        parent: The checkpoint that a fork, or the weights of a new run, start from, or None.
        parent_step: Its step.
    """

    def __init__(self, config: dict[str, Any], parent: str | None, parent_step: int | None):
        self.config, self.parent, self.parent_step = config, parent, parent_step
        self.final_val: float | None = None
        self.written: dict[str, Any] | None = None
        self._before_last_eval: dict[str, float | None] = {"final_val": None}
        self.facts: dict[str, Any] = {}
        """What is known at the start. Files may change during a long run."""

    def state_dict(self) -> dict[str, Any]:
        names = ("final_val", "parent", "parent_step")
        return {name: getattr(self, name) for name in names} | {"before_last_eval": self._before_last_eval}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.final_val, self._before_last_eval = state_dict["final_val"], state_dict["before_last_eval"]
        self.parent, self.parent_step = state_dict["parent"], state_dict["parent_step"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.facts = {
            "params_total": pl_module.net.params_total(),
            "params_active": pl_module.net.params_active(),
            "seed": trainer.datamodule.config.seed,
            "versions": versions(),
            "git_commit": git_commit(),
            "data_sha256": trainer.datamodule.text_stats.sha256,
            "data_files": [path.name for path in trainer.datamodule.read().files],
            "tokenizer_sha256": trainer.datamodule.tokenizer.sha256,
            "parent": self.parent,
            "parent_step": self.parent_step,
        }

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        self._before_last_eval = {"final_val": self.final_val}
        self.final_val = pl_module.eval_metrics["val/loss"]

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        reason = get_callback(trainer, GracefulStop).reason
        stopped = any(map(has_stopped, trainer.early_stopping_callbacks))
        self._write(trainer, pl_module, reason or ("early_stopping" if stopped else "completed"))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.facts and not self._is_final(trainer):  # the run ended, but was killed before it wrote its summary
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.facts:
            with suppress(OSError):  # a full disk may be the reason
                self._write(trainer, pl_module, "diverged" if isinstance(exception, DivergenceError) else "error")

    def _is_final(self, trainer: Trainer) -> bool:
        summary = read_summary(Path(trainer.default_root_dir, SUMMARY_FILE))
        return (
            summary is not None
            and summary["total_steps"] == trainer.global_step
            and summary["stop_reason"] in NORMAL_STOPS
        )

    @torch.no_grad()
    def _final_train_loss(self, trainer: Any, pl_module: Any) -> float:
        was_training, nats, tokens = pl_module.net.training, 0.0, 0
        pl_module.net.eval()
        with averaged_weights(trainer, pl_module), trainer.precision_plugin.val_step_context():  # as in an evaluation
            for inputs, targets, counts in trainer.datamodule.train_eval_batches():
                nll = pl_module.sequence_nll(inputs.to(pl_module.device), targets.to(pl_module.device))  # (B,)
                nats, tokens = nats + nll.cpu().double().sum().item(), tokens + int(counts[:, 0].sum())
        pl_module.net.train(was_training)
        return nats / tokens

    def _write(self, trainer: Any, pl_module: Any, reason: str) -> None:
        final_train_loss = self._final_train_loss(trainer, pl_module) if reason in NORMAL_STOPS else None
        if not trainer.is_global_zero:
            return
        metrics = get_callback(trainer, TrainMetrics)
        self.written = {
            **get_callback(trainer, BestCheckpoint).best,
            "final_train_loss": final_train_loss,
            "final_val_loss": self.final_val,
            "total_steps": trainer.global_step,
            "stop_reason": reason,
            "tokens_seen": metrics.tokens_seen,
            "wall_seconds": get_callback(trainer, GracefulStop).seconds,
            "tokens_per_s": metrics.tokens_per_s,
            **self.facts,
            "config": self.config,
        }
        atomic_write(Path(trainer.default_root_dir, SUMMARY_FILE), json.dumps(self.written, indent=2).encode())


def format_summary(summary: dict[str, Any], run_dir: Path) -> str:
    """The end of a run in a few lines, and the command that resumes it."""
    best = "none: the run ended before its first evaluation"
    if summary["best_val"] is not None:
        value, per_char = summary["best_val"], summary["best_nats_per_char"]
        best = f"{value:.4f} nats/token, {per_char:.4f} nats/char at step {summary['best_step']}"
    speed = f"{summary['tokens_per_s']:,.0f} tokens/s, " if summary["tokens_per_s"] else ""
    rows = {
        "best val/loss": best,
        "stopped": f"{summary['stop_reason']} after step {summary['total_steps']}",
        "speed": f"{speed}{summary['wall_seconds']:.0f} s in total",
        "model": f"{summary['params_total']:,} parameters, {summary['params_active']:,} active",
        "files": run_dir,
        "continue with": resume_command(summary["stop_reason"], run_dir, summary["config"]),
    }
    return "\n".join(f"  {name:14}{value}" for name, value in rows.items())


def resume_command(reason: str, run_dir: Path, config: dict[str, Any]) -> str:
    """The command that resumes a run of this configuration that has stopped for this reason."""
    limits = {
        "completed": "--trainer.max_steps",
        "early_stopping": "--early_stopping.patience",
        "time_limit": "--trainer.max_time",
    }
    more = f" {limits[reason]} MORE" if reason in limits else ""
    own = "".join(f" {word}" for word in user_class_args(config))
    return f"minigpt fit --run_dir {shlex.quote(str(run_dir))} --ckpt_path last{own}{more}"
