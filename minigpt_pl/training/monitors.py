"""Metrics that a callback may monitor: found out before a run starts, since Lightning looks at the first evaluation."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from lightning.pytorch import Callback

from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.user_classes import is_own

ALWAYS = (
    "train/loss", "train/grad_norm", "lr", "val/loss", "val/nats_per_char", "val/bits_per_byte", "val/perplexity",
)  # fmt: skip
EXPERTS = ("train/aux_loss", "moe/entropy", "moe/dead_experts")
BY_EVAL_MODE = {"full": (), "both": ("val/full_loss", "val/full_nats_per_char"), "sampled": ("train/eval_loss",)}
COUNTERS = ("step", "epoch")
"""ModelCheckpoint monitors them too."""


def monitorable(model: Any, eval_mode: str) -> set[str]:
    """The metrics that each evaluation of one of our models has, without the load of single experts."""
    experts = EXPERTS if getattr(model.config, "n_experts", 0) else ()
    return {*ALWAYS, *experts, *BY_EVAL_MODE[eval_mode]}


def check_monitors(callbacks: Iterable[Callback], model: Any, eval_mode: str) -> None:
    """Raises UserError for a monitor that no evaluation has. What classes of the user's own log is not known."""
    callbacks = list(callbacks)
    if not all(type(one).__module__.startswith(("lightning.", "minigpt_pl.")) for one in (model, *callbacks)):
        return
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        known = monitorable(model, eval_mode)
        counter = name in COUNTERS and hasattr(callback, "save_top_k")
        if not isinstance(name, str) or name in known or counter or is_own(type(callback)):
            continue
        if not getattr(callback, "strict", True) or (name.startswith("moe/load_") and EXPERTS[0] in known):
            continue
        near = get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"monitor one of {', '.join(sorted(known))}"
        subject = f"trainer.callbacks.{type(callback).__name__}"
        raise UserError("no evaluation has this metric", option=f"{subject}.monitor", value=name, remedy=remedy)
