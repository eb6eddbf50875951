"""What saves a run: best.ckpt, last.ckpt, and the configuration in config.yaml and in every checkpoint.

`checkpoint.io` writes the files atomically.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from minigpt_pl.checkpoint.io import BEST_CKPT, LAST_CKPT
from minigpt_pl.runtime.atomic_io import CONFIG_FILE, atomic_write
from minigpt_pl.runtime.ranges import PositiveFloat, PositiveInt
from minigpt_pl.training.callbacks import get_callback
from minigpt_pl.training.patches import evaluation_follows, step_ended


@dataclass
class CheckpointConfig:
    """When last.ckpt is saved, beside the run's first and last step.

    Args:
        every_n_train_steps: Steps between two saves.
        every_n_minutes: Longest time between two saves, in minutes.
    """

    every_n_train_steps: PositiveInt = 200
    every_n_minutes: PositiveFloat = 5.0


class SaveConfig(Callback):
    """Writes the whole resolved configuration to config.yaml and into every checkpoint.

    Args:
        config: The configuration.
        wandb_id: The id of the W&B run, which stays the same after a resume.
    """

    def __init__(self, config: dict[str, Any], wandb_id: str):
        self.config, self.wandb_id = config, wandb_id

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            text = yaml.safe_dump(self.config, sort_keys=False)
            atomic_write(Path(trainer.default_root_dir, CONFIG_FILE), text.encode())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"config": self.config, "wandb_id": self.wandb_id}


class BestCheckpoint(ModelCheckpoint):
    """Keeps best.ckpt, the checkpoint with the lowest val/loss, the first one on ties.

    Lightning's state holds paths, and loses the best score when the run directory has moved; here it holds the metrics.

    Attributes:
        best: Step and metrics of the best evaluation, by their names in summary.json; None before the first. With
            eval_mode both also the exact loss at that step, and where the exact loss was lowest.
    """

    NO_EVAL = dict.fromkeys(("best_val", "best_step", "best_nats_per_char", "best_bits_per_byte"))

    def __init__(self, run_dir: str):
        name = BEST_CKPT.removesuffix(".ckpt")
        super().__init__(run_dir, name, "val/loss", save_on_train_epoch_end=False, enable_version_counter=False)
        self.path = self.format_checkpoint_name({})  # as Lightning spells it: it deletes a file with another name
        self.best: dict[str, Any] = self.NO_EVAL

    on_train_batch_end = Callback.on_train_batch_end  # Lightning would save here too, before the evaluation

    @property
    def state_key(self) -> str:
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        return self.best

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict
        if (loss := state_dict["best_val"]) is not None:
            self.best_model_path = self.kth_best_model_path = self.path
            self.best_model_score = self.kth_value = torch.tensor(loss)
            self.best_k_models = {self.path: self.best_model_score}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        metrics = pl_module.eval_metrics
        full = {"full_val_at_best": metrics["val/full_loss"]} if "val/full_loss" in metrics else {}
        if self.best["best_val"] is None or metrics["val/loss"] < self.best["best_val"]:
            names = ("val/loss", "val/nats_per_char", "val/bits_per_byte")
            loss, per_char, per_byte = (metrics[name] for name in names)
            best = dict(zip(self.NO_EVAL, (loss, trainer.global_step, per_char, per_byte), strict=True))
            self.best = self.best | best | full
        if full and metrics["val/full_loss"] < self.best.get("best_full_val", math.inf):
            self.best = self.best | {"best_full_val": metrics["val/full_loss"], "best_full_step": trainer.global_step}
        super().on_validation_end(trainer, pl_module)  # saves, with `best` in the state


class LastCheckpoint(Checkpoint):
    """Keeps last.ckpt, from which a run resumes.

    It is written when training starts, every so many steps and minutes, with each best.ckpt, and at the end. Where an
    evaluation is due, it is written afterwards; otherwise a resumed run would lack the evaluation.
    """

    def __init__(self, run_dir: str, every_n_train_steps: int, every_n_minutes: float):
        self.path = os.path.join(run_dir, LAST_CKPT)
        self.every_n_train_steps, self.every_n_seconds = every_n_train_steps, every_n_minutes * 60
        self._saved_at = 0.0

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()

    def _is_due(self, trainer: Trainer, pl_module: Any) -> bool:
        late = time.monotonic() - self._saved_at >= self.every_n_seconds
        late = trainer.strategy.reduce_boolean_decision(late, all=False)  # all processes save together
        return pl_module.stop_requested or late or trainer.global_step % self.every_n_train_steps == 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)  # on a resume too: options may have changed

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if step_ended(trainer) and self._is_due(trainer, pl_module) and not evaluation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        improved = get_callback(trainer, BestCheckpoint).best["best_step"] == trainer.global_step
        if self._is_due(trainer, pl_module) or trainer.should_stop or improved:
            self._save(trainer)
