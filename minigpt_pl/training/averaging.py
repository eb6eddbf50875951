"""Averaged weights: an exponential moving average (EMA), which is evaluated and saved in place of the trained weights.

Lightning's EMAWeightAveraging does this too. Here the first steps count equally, samples and the final training loss
are those of the average, a checkpoint's digest covers both sets of weights, and nothing but the step decides an update.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from minigpt_pl.checkpoint.io import TRAINED_WEIGHTS
from minigpt_pl.runtime.ranges import OpenUnitInterval
from minigpt_pl.training.patches import step_ended


class WeightAverage(Callback):
    """Keeps an average of the weights after each step. At the end of a fit the model has the averaged weights.

    The first 1 / (1 - decay) steps count equally; afterwards each step counts `decay` times as much as the next one.
    A checkpoint has the average in its state_dict, and the trained weights, from which a run resumes, beside it.

    Args:
        decay: Above 0 and below 1.
    """

    def __init__(self, decay: OpenUnitInterval):
        self.decay = decay
        self._average: list[Tensor] | None = None
        self._restored: dict[str, Tensor] | None = None

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(TRAINED_WEIGHTS)

    @torch.no_grad()
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._average = [parameter.detach().clone() for parameter in pl_module.parameters()]
        if self._restored is not None:
            for name, parameter in pl_module.named_parameters():
                parameter.copy_(self._restored[name])
            self._restored = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if step_ended(trainer):
            current = [parameter.detach() for parameter in pl_module.parameters()]
            assert self._average is not None
            torch._foreach_lerp_(self._average, current, max(1 - self.decay, 1 / trainer.global_step))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._average is not None:
            averages = dict(zip(pl_module.parameters(), self._average, strict=True))
            named = dict(pl_module.named_parameters(remove_duplicate=False))  # a tied weight has two names
            trained = checkpoint["state_dict"]
            checkpoint[TRAINED_WEIGHTS] = {name: trained[name] for name in named}
            checkpoint["state_dict"] = trained | {name: averages[parameter] for name, parameter in named.items()}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._swap(pl_module)
        self._average = None

    @torch.no_grad()
    def _swap(self, pl_module: Any) -> None:
        for parameter, average in zip(pl_module.parameters(), self._average or (), strict=False):
            trained = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(trained)

    @contextmanager
    def in_use(self, pl_module: Any) -> Iterator[None]:
        """The model has the averaged weights inside."""
        self._swap(pl_module)
        try:
            yield
        finally:
            self._swap(pl_module)


@contextmanager
def averaged_weights(trainer: Any, pl_module: Any) -> Iterator[None]:
    """The model has the weights that evaluations see: averaged ones, if the trainer averages."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAverage):
                stack.enter_context(callback.in_use(pl_module))
        yield
