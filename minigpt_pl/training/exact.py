"""What makes the runs of an ordinary Trainer exact: the same parts that `fit` uses, as arguments of a Trainer.

The parts themselves are in `averaging`, `callbacks`, `metrics`, `checkpointing` and `checkpoint.io`.
"""

from pathlib import Path
from typing import Any

from minigpt_pl.checkpoint.io import AtomicCheckpointIO
from minigpt_pl.training.averaging import WeightAverage
from minigpt_pl.training.callbacks import StepSeeder
from minigpt_pl.training.checkpointing import BestCheckpoint, CheckpointConfig, LastCheckpoint
from minigpt_pl.training.metrics import TrainMetrics


def exact_training(
    run_dir: str | Path, seed: int | None = None, ema_decay: float | None = None, **checkpoint: Any
) -> dict[str, Any]:
    """Arguments of a Trainer whose runs resume to the bit: `Trainer(max_steps=1000, **exact_training("runs/mine"))`.

    Dropout is drawn from the seed and the step. best.ckpt and last.ckpt in `run_dir` are written completely or not at
    all; `trainer.fit(model, data, ckpt_path="runs/mine/last.ckpt")` resumes. A run that diverges ends with an error.
    To use further callbacks, add them to the list under "callbacks".

    Args:
        run_dir: Where the checkpoints are written; the Trainer's default_root_dir.
        seed: Seed of dropout; by default that of the TextDataModule.
        ema_decay: The decay of `averaging.WeightAverage`; None for no average.
        checkpoint: The arguments of CheckpointConfig: when last.ckpt is saved.
    """
    saves = CheckpointConfig(**checkpoint)
    return {
        "default_root_dir": str(run_dir),
        "callbacks": [
            *([] if ema_decay is None else [WeightAverage(ema_decay)]),
            StepSeeder(seed),
            TrainMetrics(),
            BestCheckpoint(str(run_dir)),
            LastCheckpoint(str(run_dir), saves.every_n_train_steps, saves.every_n_minutes),
        ],
        "plugins": [AtomicCheckpointIO()],
    }
