"""Where figures go: metrics.csv, which a resumed run goes on with, and Weights & Biases, offline unless told otherwise.

What is logged, and when, is in `callbacks`.
"""

import csv
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from minigpt_pl.checkpoint import TEMPORARY

FIRST = ["step", "part"]


class MetricsCSV(Logger):
    """metrics.csv: one row for each (step, train or val). Lightning's CSVLogger would delete the file on a resume.

    Args:
        path: The file.
        step: Completed steps of the checkpoint that the run goes on from; later rows are dropped, they come again.
        drop_check: Whether that step's check is dropped too.
    """

    def __init__(self, path: Path, step: int, drop_check: bool):
        super().__init__()
        self.path = path
        self.columns = list(FIRST)
        self.rows: list[dict[str, str]] = []
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
                self.columns = list(reader.fieldnames or FIRST)
                kept = ((step, "train"), (step, "" if drop_check else "val"))
                for row in reader:
                    if (row["step"] or "").isdigit() and (int(row["step"]) < step or (int(row["step"]), row["part"]) in kept):
                        self.rows.append(row)
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        part = "val" if "val/loss" in metrics else "train"
        row = {"step": str(step), "part": part} | {name: repr(value) for name, value in metrics.items()}
        self.rows.append(row)
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self._rewrite()
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self) -> None:
        temporary = self.path.with_name(f"{self.path.name}{TEMPORARY}")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.path)


@dataclass
class Wandb:
    """Weights & Biases. `--wandb null` does without.

    Args:
        offline: Keep everything on this machine.
        project: Where runs are gathered.
        name: What the run is called; the run directory's name unless given.
        group: Runs that belong together, such as the seeds of one configuration.
        job_type: What kind of run it is within its group.
        tags: To find it by.
    """

    offline: bool = True
    project: str = "minigpt"
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] | None = None

    def logger(self, run_dir: Path, run_id: str, settings: dict[str, Any]) -> WandbLogger:
        """A logger for the run of this id; nothing is written before it is first used.

        Args:
            run_dir: Its files go to `wandb/` in there.
            run_id: The same after a resume.
            settings: The whole resolved configuration.
        """
        options = asdict(self) | {"name": self.name or run_dir.name}
        options["mode"] = "offline" if options.pop("offline") else "online"  # Lightning's offline=True leaks into os.environ
        quiet = wandb.Settings(silent=True, console="off")
        logger = WandbLogger(save_dir=str(run_dir), id=run_id, config=settings, settings=quiet, **options)
        del logger._wandb_init["anonymous"]  # wandb warns of it
        return logger
