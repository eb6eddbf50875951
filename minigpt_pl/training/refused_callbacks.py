"""Callbacks of Lightning that would make a run's files or metrics wrong: why, and what to use instead.

All others work beside those of this project; `docs/lightning.md` has the whole list.
"""

import re
from collections.abc import Iterable

from lightning.pytorch import Callback, callbacks

from minigpt_pl.runtime.errors import UserError

REFUSED: dict[type[Callback], tuple[str, str]] = {
    callbacks.LearningRateFinder: (
        "it changes the rate that config.yaml records, and searches again on a resume",
        "call Tuner.lr_find from Python (docs/python.md), then use --model.lr",
    ),
    callbacks.BatchSizeFinder: (
        "it changes the batch size that config.yaml records",
        "call Tuner.scale_batch_size from Python (docs/python.md), then use --data.batch_size",
    ),
    callbacks.StochasticWeightAveraging: (
        "it counts epochs, and no evaluation would see its weights",
        "use --ema_decay 0.99",
    ),
    callbacks.GradientAccumulationScheduler: (
        "the micro-batches of a step must not change",
        "use --trainer.accumulate_grad_batches",
    ),
    callbacks.BaseFinetuning: (
        "it freezes parameters by epoch",
        "override configure_optimizers in your own model",
    ),
    callbacks.ModelPruning: ("its checkpoints hold masks beside the weights", "prune a trained model from Python"),
    callbacks.OnExceptionCheckpoint: (
        "what it saves in the middle of a step cannot be resumed",
        "leave it out: last.ckpt is saved at the end of steps",
    ),
    callbacks.Timer: ("it does not count the time before a resume", "use --trainer.max_time"),
}


def check_names(text: str) -> None:
    """Raises UserError if a value of trainer.callbacks names a class of REFUSED, which the parser may not build."""
    for cls, (problem, remedy) in REFUSED.items():
        if re.search(rf"\b{cls.__name__}\b", text):
            raise UserError(problem, option="trainer.callbacks", value=cls.__name__, remedy=remedy)


def check_callbacks(given: Iterable[Callback]) -> None:
    """Raises UserError for the first callback that would make something wrong."""
    for callback in given:
        for cls, (problem, remedy) in REFUSED.items():
            if isinstance(callback, cls):
                name = type(callback).__name__
                raise UserError(problem, option="trainer.callbacks", value=name, remedy=remedy)
