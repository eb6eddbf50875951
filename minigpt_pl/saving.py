"""What saves a run: best.ckpt, last.ckpt, and the settings in config.yaml and in every checkpoint.

How a file is written, so that it is whole or not there, is in `checkpoint`.
"""

import os
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from minigpt_pl.callbacks import check_is_due, step_is_whole
from minigpt_pl.checkpoint import BEST, LAST
from minigpt_pl.errors import Diverged, InputError
from minigpt_pl.text import write_atomically


class SaveSettings(Callback):
    """Writes the whole resolved configuration to config.yaml and into every checkpoint.

    Args:
        settings: The configuration.
        extra: What else a checkpoint needs to go on, by name.
    """

    def __init__(self, settings: dict[str, Any], extra: dict[str, Any]):
        self.settings, self.extra = settings, extra

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            text = yaml.safe_dump(self.settings, sort_keys=False)
            write_atomically(Path(trainer.default_root_dir, "config.yaml"), text.encode())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        vocab_size = pl_module.net.token_embedding.num_embeddings
        checkpoint.update(self.extra, settings=self.settings, vocab_size=vocab_size)


class _Saving(ModelCheckpoint):
    """What best and last share: no version in the name, no save of numbers that are not finite, a folder that may move."""

    def __init__(self, run_dir: str, filename: str, monitor: str | None):
        super().__init__(
            run_dir,
            filename.removesuffix(".ckpt"),
            monitor,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
            every_n_epochs=1 if monitor else 0,
        )

    @property
    def state_key(self) -> str:
        return type(self).__name__

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if not trainer.lightning_module.is_finite():  # type: ignore[operator]
            raise Diverged(f"step {trainer.global_step}: the loss, the gradient or a weight is not a finite number")
        super()._save_checkpoint(trainer, filepath)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})


class BestCheckpoint(_Saving):
    """Keeps best.ckpt, the checkpoint with the lowest val/loss, the first on ties."""

    def __init__(self, run_dir: str):
        super().__init__(run_dir, BEST, "val/loss")


class LastCheckpoint(_Saving):
    """Keeps last.ckpt, from which a run goes on: written before the first step, in between, and at the end.

    Where a check is due it is written after the check, which would be lost otherwise.
    """

    def __init__(self, run_dir: str, every_n_train_steps: int, minutes: float):
        super().__init__(run_dir, LAST, None)
        if every_n_train_steps < 1:
            raise InputError(f"last.every_n_train_steps is {every_n_train_steps}: it must be at least 1")
        if not minutes > 0:
            raise InputError(f"last.minutes is {minutes}: it must be positive")
        self.every_n_steps, self.minutes = every_n_train_steps, minutes
        self._file = os.path.join(run_dir, LAST)
        self._saved_at, self._saved_step = 0.0, -1

    def _save(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.global_step:
            self._save_checkpoint(trainer, self._file)
            self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def _is_due(self, trainer: Trainer, pl_module: Any) -> bool:
        late = time.monotonic() - self._saved_at >= self.minutes * 60
        if trainer.world_size > 1:
            late = trainer.strategy.broadcast(late)
        return pl_module.stop_requested or late or trainer.global_step % self.every_n_steps == 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        if trainer.global_step and os.path.exists(self._file):
            self._saved_step = trainer.global_step  # the run goes on from this very file
        self._save(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if step_is_whole(trainer, batch_idx) and not check_is_due(trainer) and self._is_due(trainer, pl_module):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_due(trainer, pl_module) or trainer.should_stop:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
