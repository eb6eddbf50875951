"""Strategies of Lightning under which a run would be wrong or could not end: why, and what to use instead.

`docs/lightning.md` has the whole list.
"""

import re
from typing import Any

from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from minigpt_pl.runtime.errors import UserError

REFUSED = {  # by a part of the name or of the class
    "spawn|fork|notebook": "its processes end without handing the run back",
    "fsdp|deepspeed|modelparallel": "it splits the model; gradient norms and checkpoints here are of a whole one",
    "xla|tpu": "no run on a TPU was ever tested",
}
REMEDY = "use ddp"


def check_strategy(value: Any) -> None:
    """Raises UserError for a value of trainer.strategy, a name or a class with its arguments, that is in REFUSED."""
    text = str(value).lower().replace("_", "")
    for part, problem in REFUSED.items():
        if re.search(part, text):
            name = value.get("class_path", "") if isinstance(value, dict) else value
            raise UserError(problem, option="trainer.strategy", value=name, remedy=REMEDY)


def check_launcher(trainer: Any) -> None:
    """Raises UserError if Lightning itself has chosen such processes, as it does in a notebook."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        check_strategy(trainer.strategy.launcher._start_method)
