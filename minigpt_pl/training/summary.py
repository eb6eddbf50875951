"""What a run leaves at its end: summary.json, and a short table for the terminal.

The figures are counted in `modules` and `callbacks`; here they are only put together.
"""

import json
import platform
import shlex
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from minigpt_pl.runtime.atomic_io import SUMMARY_FILE, atomic_write
from minigpt_pl.runtime.errors import DivergenceError
from minigpt_pl.training.callbacks import TrainMetrics, get_callback, is_unscheduled_eval
from minigpt_pl.training.stopping import GracefulStop, ValLossEarlyStopping

GIT_DESCRIBE = ("--always", "--dirty", "--abbrev=40", "--exclude=*")
NORMAL_STOPS = ("completed", "early_stopping", "time_limit")


def git_commit() -> str | None:
    """The commit of the package's checkout, "-dirty" where files differ from it; None where the package is in none.

    A repository that merely lies around it, as around an environment in a folder of one, does not track this file.
    """
    asked = ("ls-files", "--error-unmatch", Path(__file__).name), ("describe", *GIT_DESCRIBE)
    try:
        for words in asked:
            done = subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
                start_new_session=True,  # no Ctrl-C for it
            )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class RunSummary(Callback):
    """Follows the best check and writes summary.json when the run ends, however it ends.

    Args:
        settings: The whole resolved configuration.
        parent: The checkpoint that a branch starts from, or None.
        parent_step: Its step.

    Attributes:
        off_grid: Of the last check, if it lay off the grid: final_val before it. A run that goes on beyond it drops it.
    """

    def __init__(self, settings: dict[str, Any], parent: str | None, parent_step: int | None):
        self.settings = settings
        self.parent, self.parent_step = parent, parent_step
        self.best: dict[str, Any] = dict.fromkeys(("best_val", "best_step", "best_nats_per_char", "best_bits_per_byte"))
        self.final_val: float | None = None
        self.off_grid: dict[str, float | None] = {}
        self.written: dict[str, Any] | None = None
        self._code: dict[str, Any] = {}  # what runs, as it was at the start: files may change under a long run
        self._started = False

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best", "final_val", "off_grid", "parent", "parent_step")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.final_val, self.off_grid = (state_dict[name] for name in ("best", "final_val", "off_grid"))
        self.parent, self.parent_step = state_dict["parent"], state_dict["parent_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._code = True, provenance()
        self.final_val, self.off_grid = self.off_grid.get("final_val", self.final_val), {}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.off_grid = {"final_val": self.final_val} if is_unscheduled_eval(trainer) else {}
        self.final_val = pl_module.eval_metrics["val/loss"]
        if self.best["best_val"] is None or self.final_val < self.best["best_val"]:
            self.best = {
                "best_val": self.final_val,
                "best_step": trainer.global_step,
                "best_nats_per_char": pl_module.eval_metrics["val/nats_per_char"],
                "best_bits_per_byte": pl_module.eval_metrics["val/bits_per_byte"],
            }

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        stops = get_callback(trainer, GracefulStop)
        early = next((c for c in trainer.callbacks if isinstance(c, ValLossEarlyStopping)), None)
        reason = stops.reason or ("early_stopping" if early and early.patience_exhausted else "completed")
        self._write(trainer, pl_module, reason)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._started and not summary_is_final(
            trainer
        ):  # nothing was left to train, but it died before it said so
            self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._started:
            with suppress(OSError):  # the disk may be why it ends
                self._write(trainer, pl_module, "diverged" if isinstance(exception, DivergenceError) else "error")

    @torch.no_grad()
    def _final_train_loss(self, trainer: Any, pl_module: Any) -> float:
        training, nats, tokens = pl_module.net.training, 0.0, 0
        pl_module.net.eval()
        for inputs, targets, counts in trainer.datamodule.train_eval_batches():
            nll = pl_module.sequence_nll(inputs.to(pl_module.device), targets.to(pl_module.device))
            nats, tokens = nats + nll.cpu().double().sum().item(), tokens + int(counts[:, 0].sum())
        pl_module.net.train(training)
        return nats / tokens

    def _write(self, trainer: Any, pl_module: Any, reason: str) -> None:
        figures, seconds = get_callback(trainer, TrainMetrics), get_callback(trainer, GracefulStop).seconds
        with trainer.precision_plugin.val_step_context():  # as in a check
            final_train = self._final_train_loss(trainer, pl_module) if reason in NORMAL_STOPS else None
        if not trainer.is_global_zero:
            return
        data, net = trainer.datamodule, pl_module.net
        summary = self.best | {
            "final_train_loss": final_train,
            "final_val_loss": self.final_val,
            "total_steps": trainer.global_step,
            "stop_reason": reason,
            "params_total": net.params_total(),
            "params_active": net.params_active(),
            "tokens_seen": figures.tokens_seen,
            "wall_seconds": seconds,
            "tokens_per_s": figures.tokens_per_s,
            "seed": data.seed,
            **(self._code or provenance()),
            "data_sha256": data.text_info.sha256,
            "tokenizer_sha256": data.tokenizer.sha256,
            "parent": self.parent,
            "parent_step": self.parent_step,
            "config": self.settings,
        }
        atomic_write(Path(trainer.default_root_dir, SUMMARY_FILE), json.dumps(summary, indent=2).encode())
        self.written = summary


def summary_is_final(trainer: Trainer) -> bool:
    """Whether summary.json is that of the end of this run."""
    try:
        found = json.loads(Path(trainer.default_root_dir, SUMMARY_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return found["total_steps"] == trainer.global_step and found["stop_reason"] in NORMAL_STOPS


def provenance() -> dict[str, Any]:
    """Which code this is."""
    return {"versions": versions(), "git_commit": git_commit()}


def versions() -> dict[str, str]:
    names = ("minigpt_pl", "torch", "lightning", "jsonargparse", "torchmetrics", "tokenizers", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def format_summary(summary: dict[str, Any], run_dir: Path) -> str:
    """The end of a run in a few lines, and how to go on from it."""
    best = "none: no check was made"
    if summary["best_val"] is not None:
        value, per_char = summary["best_val"], summary["best_nats_per_char"]
        best = f"{value:.4f} nats/token, {per_char:.4f} nats/char at step {summary['best_step']}"
    speed = f"{summary['tokens_per_s']:,.0f} tokens/s, " if summary["tokens_per_s"] else ""
    rows = {
        "best val/loss": best,
        "stopped": f"{summary['stop_reason']} after step {summary['total_steps']}",
        "speed": f"{speed}{summary['wall_seconds']:.0f} s in all",
        "model": f"{summary['params_total']:,} parameters, {summary['params_active']:,} active",
        "files": f"{run_dir}",
        "continue with": resume_command(summary["stop_reason"], run_dir),
    }
    return "\n".join(f"  {name:14}{value}" for name, value in rows.items())


def resume_command(reason: str, run_dir: Path) -> str:
    """The command that goes on with a run that has stopped."""
    more = {
        "completed": " --trainer.max_steps MORE",
        "early_stopping": " --early_stopping.patience MORE",
        "time_limit": " --trainer.max_time MORE",
    }
    return f"minigpt fit --run_dir {shlex.quote(str(run_dir))} --ckpt_path last{more.get(reason, '')}"
