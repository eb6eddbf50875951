"""BestCheckpoint alone: which evaluation it keeps. How a run is saved and resumed is in tests/integration."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minigpt_pl.training.checkpointing import BestCheckpoint


def test_the_first_of_equal_evaluations_is_the_best(tmp_path: Path) -> None:
    best, saved_at = BestCheckpoint(str(tmp_path)), []
    for step, loss in ((5, 2.0), (10, 2.0), (15, 1.5), (20, 1.75), (25, 1.5)):
        trainer: Any = SimpleNamespace(global_step=step, save_checkpoint=lambda path, at=step: saved_at.append(at))
        module: Any = SimpleNamespace(eval_metrics=dict.fromkeys(("val/nats_per_char", "val/bits_per_byte"), loss))
        module.eval_metrics["val/loss"] = loss
        best.on_validation_end(trainer, module)
    assert saved_at == [5, 15]
    assert (best.best["best_val"], best.best["best_step"]) == (1.5, 15)
