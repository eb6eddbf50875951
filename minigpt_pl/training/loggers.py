"""Where metrics go: metrics.csv, which a resumed run continues, and Weights & Biases, offline by default.

What is measured, and when, is in `metrics`; only what W&B alone shows is put together here.
"""

import csv
import io
import json
import os
import secrets
import sys
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import Logger, WandbLogger

from minigpt_pl.checkpoint.io import BEST_CKPT
from minigpt_pl.data.baselines import MAX_BASELINE_CHARACTERS, split_baselines
from minigpt_pl.runtime.atomic_io import SAMPLES_FILE, SUMMARY_FILE, atomic_write
from minigpt_pl.runtime.errors import UserError, one_line
from minigpt_pl.training.by_products import read_metrics, read_or_set_aside, read_samples, read_summary
from minigpt_pl.training.callbacks import get_callback
from minigpt_pl.training.patches import remove_anonymous, wandb_environment
from minigpt_pl.training.summary import RunSummary

WITHOUT_WANDB = "correct this, or train without W&B by --wandb null"


class ResumableCSVLogger(Logger):
    """metrics.csv: one row for each (step, train or val). Lightning's CSVLogger would delete the file on a resume.

    Args:
        path: The file.
        step: Completed steps of the checkpoint that the run resumes from; later rows are dropped and written again.
        dropped: The splits whose row of that step is dropped too.
    """

    name = version = ""

    def __init__(self, path: Path, step: int, dropped: Container[str] = ()):
        super().__init__()
        self.path, self.columns = path, ["step", "split"]
        self.rows: list[dict[str, str]] = []
        if step > 0:
            self.columns, rows = read_or_set_aside(path, read_metrics, (self.columns, self.rows))
            rows = [row for row in rows if int(row["step"]) <= step]
            self.rows = [row for row in rows if int(row["step"]) != step or row["split"] not in dropped]
        self._rewrite()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        split = "val" if "val/loss" in metrics else "train"
        row = {"step": str(step), "split": split} | {name: repr(value) for name, value in metrics.items()}
        row |= {name: str(int(metrics[name])) for name in metrics.keys() & {"tokens_seen"}}  # Lightning makes floats
        self.rows.append(row)
        if new_columns := [name for name in row if name not in self.columns]:
            self.columns += new_columns
            self.finalize("success")
            self._rewrite()
        else:
            self._writer.writerow(row)

    def finalize(self, status: str) -> None:
        self._file.close()

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write(self.path, text.getvalue().encode())
        self._file = self.path.open("a", newline="", encoding="utf-8", buffering=1)
        self._writer = csv.DictWriter(self._file, self.columns)


class BufferedWandbLogger(WandbLogger):
    """W&B's logger, which gets its rows every few seconds.

    Each call of W&B wakes threads and another process, which takes longer than a step of a small model.
    """

    max_delay = 2.0  # seconds

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._rows: list[tuple[dict[str, Any], int | None]] = []
        self._flushed_at = time.monotonic()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._rows.append((dict(metrics), step))
        if time.monotonic() - self._flushed_at >= self.max_delay:
            self.flush()

    def flush(self) -> None:
        rows, self._rows, self._flushed_at = self._rows, [], time.monotonic()
        for metrics, step in rows:
            super().log_metrics(metrics, step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Its config is the whole configuration of the run."""


@dataclass
class WandbConfig:
    """Weights & Biases. `--wandb null` trains without it.

    Args:
        offline: Keep everything on this machine.
        project: The W&B project of the run.
        entity: User or team of the project; by default the one that W&B knows.
        id: Id of the W&B run; by default a new one, or that of the resumed run.
        name: Name of the run; by default that of the run directory.
        group: Runs that belong together, such as the seeds of one configuration.
        job_type: Kind of run within its group.
        tags: Tags of the run, as [a, b] or a,b.
        log_best: Store best.ckpt as an artifact when the run ends.

    Raises:
        UserError: If a tag is not one for W&B.
    """

    offline: bool = True
    project: str = "minigpt"
    entity: str | None = None
    id: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] | None | str = None
    log_best: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.tags, str):  # as in WANDB_TAGS
            self.tags = [tag.strip() for tag in self.tags.split(",") if tag.strip()]
        if not all(1 <= len(tag) <= 64 for tag in self.tags or ()):
            raise UserError("W&B takes tags of 1 to 64 characters", option="wandb.tags", value=self.tags)

    def start(self, run_dir: Path, run_id: str, config: dict[str, Any]) -> BufferedWandbLogger:
        """A logger whose W&B run has begun.

        Raises:
            UserError: If W&B refuses.
        """
        try:
            import wandb  # takes seconds, and validate and predict do not need it

            quiet = wandb.Settings(silent=True, console="off")
        except Exception as error:  # of an installation that is not whole
            cause = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"W&B cannot be imported ({cause})", remedy=WITHOUT_WANDB) from error
        try:
            f"{run_dir.resolve()}{json.dumps(config, ensure_ascii=False)}".encode()
        except UnicodeEncodeError:
            remedy = "use another one, or train without W&B by --wandb null"
            raise UserError("W&B takes no name or path that is not UTF-8", remedy=remedy) from None
        options = asdict(self) | {"name": self.name or run_dir.name, "id": run_id}
        del options["log_best"]
        options["mode"] = (
            "offline" if options.pop("offline") else "online"
        )  # Lightning's own offline=True sets os.environ
        logger = BufferedWandbLogger(save_dir=str(run_dir), config=config, settings=quiet, **options)
        remove_anonymous(logger)
        try:
            if not self.offline and not wandb.login(prompt=False):
                remedy = "run wandb login, or leave it out"
                raise UserError("W&B has no API key", option="wandb.offline", value=False, remedy=remedy)
            _ = logger.experiment
        except wandb.Error as error:
            message = f"W&B does not start the run: {str(error).rstrip('.')}"
            raise UserError(message, remedy=WITHOUT_WANDB) from error
        return logger


def choose_run_id(config: WandbConfig | None, resumed: str | None) -> str:
    """The id of the W&B run: the option's, else that of the resumed run, if any, else WANDB_RUN_ID, else a new one.

    In a sweep, the agent has chosen WANDB_RUN_ID, and W&B accepts no other.
    """
    return (config and config.id) or resumed or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)


@contextmanager
def wandb_run(
    wandb_config: WandbConfig | None, run_dir: Path, run_id: str, config: dict[str, Any]
) -> Iterator[BufferedWandbLogger | None]:
    """W&B for one fit: starts a run, unless `wandb_config` is None, and finishes it however the fit ends."""
    if wandb_config is None:
        yield None
        return
    with wandb_environment(run_dir, wandb_config.offline):
        logger = wandb_config.start(run_dir, run_id, config)
        failed = True
        try:
            yield logger
            failed = False
        finally:
            logger.flush()
            run: Any = logger.experiment
            summary_file, best = run_dir / SUMMARY_FILE, run_dir / BEST_CKPT
            if summary := read_summary(summary_file):
                run.summary.update({name: value for name, value in summary.items() if name != "config"})
            if wandb_config.log_best and best.exists():
                run.log_artifact(str(best), name=f"best-{run_id}", type="model", aliases=["best"])
            run.finish(exit_code=int(failed))


class WandbCallback(Callback):
    """What W&B alone shows: hashes and sizes, memory, baselines, and a growing table of samples."""

    def __init__(self, logger: BufferedWandbLogger):
        self.logger = logger
        self._baselines: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        run: Any = self.logger.experiment
        data = trainer.datamodule
        for name in ("val/loss", "val/nats_per_char", "val/bits_per_byte", "val/perplexity"):
            run.define_metric(name, step_metric="trainer/global_step", summary="min")
        facts = get_callback(trainer, RunSummary).facts
        run.summary.update(facts | {"run_dir": str(Path(trainer.default_root_dir).resolve())})
        if data.text_stats.characters <= MAX_BASELINE_CHARACTERS:  # constant lines beside val/nats_per_char
            baselines = split_baselines(data)
            self._baselines = {f"baseline/{name}": metrics["nats_per_char"] for name, metrics in baselines.items()}

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        import wandb

        shown: dict[str, Any] = dict(self._baselines)
        if memory := memory_gib(pl_module.device.type):
            shown["perf/memory_gib"] = memory
        if rows := [[*row] for row in read_samples(Path(trainer.default_root_dir, SAMPLES_FILE))]:
            # A new table with all rows each time: W&B shows only the first rows of a table that is logged twice.
            shown["samples"] = wandb.Table(columns=["step", "text"], data=rows, log_mode="MUTABLE")
        self.logger.log_metrics(shown, trainer.global_step)
        self.logger.flush()


def memory_gib(device: str) -> float | None:
    """Peak memory of the device, or of the process; None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if device == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 2**20
