"""StepSeeder: the masks of dropout are a pure function of seed, step, micro-batch and process."""

from types import SimpleNamespace
from typing import Any

import torch

from minigpt_pl.training.callbacks import StepSeeder

START = {"seed": 1, "step": 3, "batch_idx": 6, "rank": 0}


def random_numbers(seed: int, step: int, batch_idx: int, rank: int) -> tuple[float, ...]:
    """What a model would draw in a micro-batch; two micro-batches are a step."""
    config = SimpleNamespace(seed=seed)
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(config=config), global_step=step, accumulate_grad_batches=2, global_rank=rank
    )
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    StepSeeder().on_train_batch_start(trainer, module, None, batch_idx)
    return tuple(torch.rand(4).tolist())


def test_dropout_is_drawn_anew_for_each_seed_step_micro_batch_and_process() -> None:
    changes: list[dict[str, int]] = [{}, {"seed": 2}, {"step": 4}, {"batch_idx": 7}, {"rank": 1}]
    draws = [random_numbers(**START | change) for change in changes]
    torch.rand(5)
    assert draws == [random_numbers(**START | change) for change in changes]
    assert len(set(draws)) == len(changes)
