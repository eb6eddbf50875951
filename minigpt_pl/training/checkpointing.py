"""What saves a run: best.ckpt, last.ckpt, and the settings in config.yaml and in every checkpoint.

How a file is written, so that it is whole or not there, is in `checkpoint`.
"""

import os
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from minigpt_pl.checkpoint.io import BEST_CKPT, LAST_CKPT
from minigpt_pl.runtime.atomic_io import CONFIG_FILE, atomic_write
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.callbacks import eval_due, get_callback, is_step_boundary


class SaveConfig(Callback):
    """Writes the whole resolved configuration to config.yaml and into every checkpoint.

    Args:
        settings: The configuration.
        extra: What else a checkpoint needs to go on, by name.
    """

    def __init__(self, settings: dict[str, Any], extra: dict[str, Any]):
        self.settings, self.extra = settings, extra

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            text = yaml.safe_dump(self.settings, sort_keys=False)
            atomic_write(Path(trainer.default_root_dir, CONFIG_FILE), text.encode())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        vocab_size = pl_module.net.token_embedding.num_embeddings
        checkpoint.update(self.extra, settings=self.settings, vocab_size=vocab_size)


class BestCheckpoint(ModelCheckpoint):
    """Keeps best.ckpt, the checkpoint with the lowest val/loss, the first on ties."""

    def __init__(self, run_dir: str):
        name = BEST_CKPT.removesuffix(".ckpt")
        super().__init__(run_dir, name, "val/loss", save_on_train_epoch_end=False, enable_version_counter=False)
        self.path = self.format_checkpoint_name({})  # in Lightning's spelling: it removes what looks like another file
        self.saved_step: int | None = None

    @property
    def state_key(self) -> str:
        return type(self).__name__

    on_train_batch_end = Callback.on_train_batch_end  # a check has to come first

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.saved_step = trainer.global_step
        super()._save_checkpoint(trainer, filepath)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.best_model_score}  # Lightning's holds paths, and loses the score when they change

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (score := state_dict["score"]) is not None:
            self.best_k_models = {self.path: score}
            self.best_model_path = self.kth_best_model_path = self.path
            self.best_model_score = self.kth_value = score


class LastCheckpoint(Checkpoint):
    """Keeps last.ckpt, from which a run goes on.

    It is written when training starts, every so many steps and minutes, with each best.ckpt, and at the end. Where a
    check is due it is written after the check, which would be lost otherwise.
    """

    def __init__(self, run_dir: str, every_n_train_steps: int, every_n_minutes: float):
        if every_n_train_steps < 1:
            raise UserError(f"checkpoint.every_n_train_steps is {every_n_train_steps}: it must be at least 1")
        if not every_n_minutes > 0:
            raise UserError(f"checkpoint.every_n_minutes is {every_n_minutes}: it must be positive")
        self.every_n_steps, self.every_n_minutes = every_n_train_steps, every_n_minutes
        self.path = os.path.join(run_dir, LAST_CKPT)
        self._saved_at = 0.0

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()

    def _is_due(self, trainer: Trainer, pl_module: Any) -> bool:
        late = time.monotonic() - self._saved_at >= self.every_n_minutes * 60
        late = trainer.strategy.reduce_boolean_decision(late, all=False)  # all processes save together
        return pl_module.stop_requested or late or trainer.global_step % self.every_n_steps == 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)  # also on a resume: settings may have changed

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_step_boundary(trainer, batch_idx) and not eval_due(trainer) and self._is_due(trainer, pl_module):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        improved = get_callback(trainer, BestCheckpoint).saved_step == trainer.global_step
        if self._is_due(trainer, pl_module) or trainer.should_stop or improved:
            self._save(trainer)
