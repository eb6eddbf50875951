"""Where figures go: metrics.csv, which a resumed run goes on with, and Weights & Biases, offline unless told otherwise.

What is counted, and when, is in `callbacks`; only what W&B alone shows is put together here.
"""

import csv
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from minigpt_pl.checkpoint.io import BEST_CKPT
from minigpt_pl.data.baselines import MAX_BASELINE_CHARACTERS, compute_baselines
from minigpt_pl.runtime.atomic_io import SAMPLES_FILE, SUMMARY_FILE, TEMP_SUFFIX
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.sampling import read_samples
from minigpt_pl.training.summary import git_commit

KEY_COLUMNS = ["step", "split"]
STEP = "trainer/global_step"  # W&B's x axis, in completed steps


class ResumableCSVLogger(Logger):
    """metrics.csv: one row for each (step, train or val). Lightning's CSVLogger would delete the file on a resume.

    Args:
        path: The file.
        step: Completed steps of the checkpoint that the run goes on from; later rows are dropped, they come again.
        drop_check: Whether that step's check is dropped too.
    """

    def __init__(self, path: Path, step: int, drop_check: bool):
        super().__init__()
        self.path = path
        self.columns = list(KEY_COLUMNS)
        self.rows: list[dict[str, str]] = []
        self._open: tuple[TextIO, csv.DictWriter[str]] | None = None
        self._begin(step, drop_check)

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def _begin(self, step: int, drop_check: bool) -> None:
        if self.path.exists() and step > 0:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or KEY_COLUMNS)
                kept = ((step, "train"), (step, "" if drop_check else "val"))
                for row in reader:
                    if (row["step"] or "").isdigit() and (
                        int(row["step"]) < step or (int(row["step"]), row["split"]) in kept
                    ):
                        self.rows.append(row)
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        split = "val" if "val/loss" in metrics else "train"
        row = {"step": str(step), "split": split} | {name: repr(value) for name, value in metrics.items()}
        self.rows.append(row)
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self._rewrite()
        else:
            if self._open is None:  # which takes longer than a row does
                file = self.path.open("a", newline="", encoding="utf-8", buffering=1)
                self._open = file, csv.DictWriter(file, self.columns)
            self._open[1].writerow(row)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._open is not None:
            self._open[0].close()
            self._open = None

    def _rewrite(self) -> None:
        self.finalize("success")
        temporary = self.path.with_name(f"{self.path.name}{TEMP_SUFFIX}")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.path)


class BufferedWandbLogger(WandbLogger):
    """W&B's logger, which is handed its rows a few seconds' worth at a time.

    Each call of W&B wakes threads and a process of its own, which costs a small model more than a step does.
    """

    seconds = 2.0  # how late a row may be

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._rows: list[tuple[dict[str, Any], int | None]] = []
        self._flushed_at = time.monotonic()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._rows.append((dict(metrics), step))
        if time.monotonic() - self._flushed_at >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Gives W&B what it has not had yet."""
        rows, self._rows, self._flushed_at = self._rows, [], time.monotonic()
        for metrics, step in rows:
            super().log_metrics(metrics, step)


@dataclass
class WandbConfig:
    """Weights & Biases. `--wandb null` does without.

    Args:
        offline: Keep everything on this machine.
        project: Where runs are gathered.
        name: What the run is called; the run directory's name unless given.
        group: Runs that belong together, such as the seeds of one configuration.
        job_type: What kind of run it is within its group.
        tags: To find it by.
        log_best: Store best.ckpt as an artifact when the run ends.
    """

    offline: bool = True
    project: str = "minigpt"
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] | None = None
    log_best: bool = False

    def logger(self, run_dir: Path, run_id: str, settings: dict[str, Any]) -> BufferedWandbLogger:
        """A logger whose run has begun.

        Args:
            run_dir: Its files go to `wandb/` in there.
            run_id: The same after a resume.
            settings: The whole resolved configuration.

        Raises:
            InputError: If W&B refuses.
        """
        import wandb  # takes a while, and validate and predict have no use for it

        options = asdict(self) | {"name": self.name or run_dir.name}
        del options["log_best"]
        # Lightning's own offline=True leaks into os.environ.
        options["mode"] = "offline" if options.pop("offline") else "online"
        quiet = wandb.Settings(silent=True, console="off")
        logger = BufferedWandbLogger(save_dir=str(run_dir), id=run_id, config=settings, settings=quiet, **options)
        del logger._wandb_init["anonymous"]  # wandb warns of it
        try:
            if not self.offline and not wandb.login(prompt=False):
                raise UserError("--wandb.offline false: W&B knows no key here; run wandb login, or leave it out")
            _ = logger.experiment
        except wandb.Error as error:
            raise UserError(
                f"--wandb: W&B refuses: {str(error).rstrip('.')}; mend that, or give --wandb null"
            ) from error
        return logger


def new_run_id() -> str:
    """What W&B will know a run by. In a sweep its agent has chosen it, and W&B heeds no other."""
    chosen = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    return chosen or secrets.token_hex(4)


@contextmanager
def wandb_run(
    said: WandbConfig | None, trainer: Trainer, run_dir: Path, run_id: str, settings: dict[str, Any]
) -> Iterator[list[Logger]]:
    """W&B for the length of a run, as a list of at most one logger; nothing of it reaches the next run.

    Args:
        said: How; None is not at all.
        trainer: Of the run; it gets a callback.
        run_dir: The run's directory.
        run_id: The same after a resume.
        settings: The whole resolved configuration.
    """
    if said is None or not trainer.is_global_zero:
        yield []
        return
    before = dict(os.environ)
    os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / "wandb").resolve()))  # copies of tables, else in the home
    if said.offline:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # it would look for its server even so
    run: Any = None
    failed = True
    try:
        logger = said.logger(run_dir, run_id, settings)
        run = logger.experiment
        trainer.callbacks.append(WandbCallback(logger))  # type: ignore[attr-defined]
        yield [logger]
        failed = False
    finally:
        if run is not None:
            logger.flush()
            finish_wandb_summary(run, run_dir, trainer.global_step, said.log_best)
            run.finish(exit_code=int(failed))
        for name in os.environ.keys() - before.keys():
            if name.startswith("WANDB_"):
                del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if name.startswith("WANDB_")})


def finish_wandb_summary(run: Any, run_dir: Path, steps: int, log_best: bool) -> None:
    """Hands W&B the run's own summary, and its best checkpoint if asked."""
    path, best = run_dir / SUMMARY_FILE, run_dir / BEST_CKPT
    summary = json.loads(path.read_text("utf-8")) if path.exists() else {"total_steps": None}
    if summary["total_steps"] == steps:  # else it is of an earlier start
        run.summary.update({name: value for name, value in summary.items() if name != "config"})
    if log_best and best.exists():
        run.log_artifact(str(best), name=f"best-{run.id}", type="model", aliases=["best"])


class WandbCallback(Callback):
    """What W&B alone shows: what was trained on what, memory, floors, and a table of samples that grows."""

    def __init__(self, logger: BufferedWandbLogger):
        self.logger = logger
        self._floors: dict[str, float] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        run: Any = self.logger.experiment
        data, net = trainer.datamodule, pl_module.net
        for name in ("val/loss", "val/nats_per_char", "val/bits_per_byte", "val/perplexity"):
            run.define_metric(name, step_metric=STEP, summary="min")
        run.summary.update(
            {
                "git_commit": git_commit(),
                "data_sha256": data.text_info.sha256,
                "tokenizer_sha256": data.tokenizer.sha256,
                "params_total": net.params_total(),
                "params_active": net.params_active(),
                "run_dir": str(Path(trainer.default_root_dir).resolve()),
            }
        )

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        import wandb

        shown: dict[str, Any] = dict(self.floors_of(trainer.datamodule))
        if used := memory_gib(pl_module.device.type):
            shown["perf/memory_gib"] = used
        if rows := [[*row] for row in read_samples(Path(trainer.default_root_dir, SAMPLES_FILE))]:
            # All rows each time, in a new table: one that is logged twice shows its first rows only.
            shown["samples"] = wandb.Table(columns=["step", "text"], data=rows, log_mode="MUTABLE")
        self.logger.log_metrics(shown, trainer.global_step)
        self.logger.flush()

    def floors_of(self, data: Any) -> dict[str, float]:
        """Flat lines to draw beside val/nats_per_char; none for a long text."""
        if self._floors is None:
            small = data.text_info.characters <= MAX_BASELINE_CHARACTERS
            found = compute_baselines(str(data.resolve_path()), data.train_frac, data.test_frac) if small else {}
            self._floors = {f"baseline/{name}": figures["nats_per_char"] for name, figures in found.items()}
        return self._floors


def memory_gib(device: str) -> float | None:
    """Memory that the run has needed so far: on the device, or of the process; None where nobody knows."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if device == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        import resource
    except ImportError:  # Windows has no resource
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 2**20
