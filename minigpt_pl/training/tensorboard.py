"""TensorBoard: the rows of metrics.csv and the samples of samples.txt as event files in the run's directory.

What is measured, and when, is in `metrics`; metrics.csv itself and Weights & Biases are in `loggers`.
"""

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import TensorBoardLogger

from minigpt_pl.runtime.atomic_io import SAMPLES_FILE, TENSORBOARD_DIR
from minigpt_pl.runtime.errors import UserError, one_line
from minigpt_pl.training.by_products import read_samples

FLUSH_SECONDS = 2  # a reader sees a row this late


def check_tensorboard(run_dir: Path) -> None:
    """Raises UserError if the package is missing or broken, or cannot write into a directory of this name."""
    try:
        import torch.utils.tensorboard  # noqa: F401  # takes a second, and only such a run needs it
    except Exception as error:  # whatever a broken package raises
        remedy = 'pip install "minigpt_pl[tensorboard]", or use --tensorboard false'
        problem = f"the package tensorboard cannot be imported ({one_line(error)})"
        raise UserError(problem, option="tensorboard", value=True, remedy=remedy) from error
    try:
        str(run_dir).encode()
    except UnicodeEncodeError:
        problem, remedy = "TensorBoard takes no path that is not UTF-8", "use another one, or --tensorboard false"
        raise UserError(problem, option="run_dir", value=run_dir, remedy=remedy) from None


class RunTensorBoardLogger(TensorBoardLogger):
    """Lightning's logger, whose event files a resumed run writes anew from metrics.csv.

    The old files could hold steps that the run trains again, and lack others that a killed process had not written yet.

    Args:
        run_dir: The run directory.
        rows: The rows of metrics.csv that the run keeps.
    """

    def __init__(self, run_dir: Path, rows: Iterable[Mapping[str, str]]):
        folder = run_dir / TENSORBOARD_DIR
        for outdated in folder.glob("events.out.tfevents.*"):
            outdated.unlink()
        # With purge_step 0, a TensorBoard that has read the old files forgets them.
        super().__init__(folder, name="", version="", purge_step=0, flush_secs=FLUSH_SECONDS)
        for row in rows:
            values = {name: float(text) for name, text in row.items() if text and name not in ("step", "split")}
            self.log_metrics(values, int(row["step"]))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    def save(self) -> None:
        """Lightning's would write them too."""
        self.experiment.flush()


class TensorBoardSamples(Callback):
    """Adds each sample of samples.txt as a text that keeps its line ends."""

    def __init__(self, logger: RunTensorBoardLogger):
        self.logger = logger

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._add(trainer, range(trainer.global_step + 1))

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._add(trainer, [trainer.global_step])

    def _add(self, trainer: Any, steps: Any) -> None:
        for step, text in read_samples(Path(trainer.default_root_dir, SAMPLES_FILE)):
            if step in steps:
                indented = textwrap.indent(text, "    ", lambda line: True)  # a block of code in Markdown
                self.logger.experiment.add_text("samples", indented, step)
