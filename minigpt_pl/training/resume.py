"""How a run continues from a checkpoint: which callbacks' states, and what Lightning's loops restore.

Relied on in Lightning: the keys of "loops" below, and that a checkpoint's "callbacks" go by `Callback.state_key`.
"""

from typing import Any

from minigpt_pl.runtime.errors import rank_zero_print


def loop_state(steps: int, micro_batches: int, evaluated: bool) -> dict[str, Any]:
    """What Lightning's loops restore: completed steps and micro-batches, and no evaluation under way.

    Lightning saves what it was in the middle of, and continues there after a resume. We save only where a step and its
    evaluation are complete.

    Args:
        steps: Optimizer steps.
        micro_batches: Micro-batches.
        evaluated: Whether an evaluation lies at this step: as Lightning skips it, it counts a step for its loggers.
    """

    def progress(ready: int, started: int, completed: int) -> dict[str, dict[str, int]]:
        counts = {"ready": ready, "started": started, "processed": completed, "completed": completed}
        return {"total": dict(counts), "current": dict(counts)}

    done = progress(steps, steps, steps)
    return {
        "fit_loop": {
            "epoch_progress": progress(1, 1, 0) if steps else progress(0, 0, 0),
            "epoch_loop.state_dict": {"_batches_that_stepped": steps - evaluated},
            "epoch_loop.batch_progress": progress(micro_batches, micro_batches, micro_batches)
            | {"is_last_batch": False},
            "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": done, "zero_grad": done}},
        }
    }


def drops_last_eval(checkpoint: dict[str, Any], max_steps: int) -> bool:
    """Whether the run is extended past an evaluation that was due only because the run ended there."""
    return "val" in dropped_splits(checkpoint, max_steps)


def dropped_splits(checkpoint: dict[str, Any], max_steps: int) -> list[str]:
    """The splits whose metrics the checkpoint's step has only because the run ended there, which is now extended."""
    step, config = checkpoint["global_step"], checkpoint["config"]
    if not step == config["trainer"]["max_steps"] < max_steps:
        return []
    intervals = {"train": config["trainer"]["log_every_n_steps"] or 50, "val": config["data"]["eval_every"]}
    return [split for split, every in intervals.items() if step % every]


def eval_protocol(config: dict[str, Any], text_sha256: str) -> tuple[Any, ...]:
    """What val/loss depends on besides the model: under another protocol, losses do not compare."""
    data, limit = config["data"], config["trainer"].get("limit_val_batches")
    names = {"full": ("max_eval_tokens",), "sampled": ("eval_iters",), "both": ("eval_iters", "max_eval_tokens")}
    return text_sha256, limit, data["eval_mode"], *(data[name] for name in names[data["eval_mode"]])


def resume_state(
    checkpoint: dict[str, Any], resuming: bool, trainer: Any, config: dict[str, Any], text_sha256: str
) -> dict[str, Any]:
    """The checkpoint as Lightning shall restore it.

    Args:
        checkpoint: As read.
        resuming: Whether the same run continues; otherwise a fork starts.
        trainer: The new trainer.
        config: The new configuration.
        text_sha256: The hash of the text.
    """
    steps = checkpoint["global_step"]
    states = {callback.state_key for callback in trainer.callbacks}
    if not resuming:  # a fork counts its own evaluations, but its weights have seen the parent's tokens
        states = {"TrainMetrics"}
    callbacks = {name: state for name, state in checkpoint["callbacks"].items() if name in states}
    if resuming and drops_last_eval(checkpoint, trainer.max_steps):
        for name in callbacks.keys() & {"ValLossEarlyStopping", "RunSummary"}:
            callbacks[name] = callbacks[name] | callbacks[name]["before_last_eval"]
    old_protocol = eval_protocol(checkpoint["config"], checkpoint["TextDataModule"]["text_sha256"])
    if resuming and old_protocol != eval_protocol(config, text_sha256):
        rank_zero_print("evaluations measure something else than before: best.ckpt and patience start again")
        for name in ("BestCheckpoint", "ValLossEarlyStopping"):
            callbacks.pop(name, None)
    evaluated = steps % config["data"]["eval_every"] == 0
    loops = loop_state(steps, steps * trainer.accumulate_grad_batches, evaluated)
    return checkpoint | {"loops": loops, "callbacks": callbacks}
