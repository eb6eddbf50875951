"""How long a run is and when it evaluates: Lightning's words for both, in optimizer steps.

On the command line a run is one epoch of Lightning, so that its steps are counted in one way from start to end, over
every resume. What is given in epochs or in batches is therefore turned into steps here, before the run is built.
"""

from typing import Any

from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.runtime.errors import UserError

EPOCH_OPTIONS = ("max_epochs", "limit_train_batches", "val_check_interval", "check_val_every_n_epoch")
"""Options of the Trainer that `in_steps` replaces."""


def in_steps(trainer: dict[str, Any], data: TextDataModule, max_steps: int | None) -> dict[str, int]:
    """The options that EPOCH_OPTIONS mean: "max_steps" and "eval_every", as far as they are set.

    An epoch reads about as many tokens as the training split has, or limit_train_batches. With limit_train_batches
    alone the run is one such epoch.

    Args:
        trainer: Options of the Trainer.
        data: The text.
        max_steps: A limit that the user has set too.

    Raises:
        UserError: If an interval between evaluations is a time.
    """
    epochs, limit, interval, every = (trainer.get(name) for name in EPOCH_OPTIONS)
    accumulate = trainer["accumulate_grad_batches"]
    found: dict[str, int] = {}
    if all(value is None for value in (epochs, limit, interval, every)):
        return found
    if interval is not None and not isinstance(interval, (int, float)):
        remedy = "give a number of batches, or --data.eval_every in steps"
        raise UserError("it must be a number", option="trainer.val_check_interval", value=interval, remedy=remedy)
    steps = data.steps_per_epoch(accumulate)
    if limit is not None:
        steps = max(1, min(steps, limit // accumulate) if isinstance(limit, int) else int(steps * limit))
    if epochs is not None or limit is not None:
        total = steps * (1 if epochs is None else epochs)
        found["max_steps"] = total if max_steps is None else min(total, max_steps)
    if interval is not None or every is not None:
        whole = steps * (every or 1)
        in_batches = interval is not None and isinstance(interval, int)
        found["eval_every"] = max(1, interval // accumulate if in_batches else int(whole * (interval or 1.0)))
    return found
