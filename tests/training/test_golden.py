"""Losses of twenty steps, digit for digit: whoever changes them changes every result there is.

Without dropout, so that a better generator of masks leaves them alone, and without Lightning, whose loop is not meant.
"""

import pytest
import torch
from support.tiny_models import VOCAB, build

from minigpt_pl.models.gpt import token_cross_entropy
from minigpt_pl.training.optim import OptimizerConfig, build_optimizer, lr_factor

EVERY_FOURTH_LOSS = {
    "classic": [2.916986, 2.809365, 2.577508, 2.394816, 2.388047],
    "dense": [2.956921, 2.872557, 2.751285, 2.606218, 2.410985],
    "switch": [2.959912, 2.895197, 2.806494, 2.628249, 2.364627],
    "mixtral": [2.955634, 2.869431, 2.743151, 2.541801, 2.355289],
}


@pytest.mark.parametrize("kind", EVERY_FOURTH_LOSS)
def test_losses_are_those_on_record(kind: str) -> None:
    model, losses = build(kind).train(), []
    optimizer = build_optimizer(model, OptimizerConfig(lr=2e-2, weight_decay=0.1, optimizer="adamw"))
    for step in range(20):
        ids = (torch.arange(17) * torch.arange(1, 9)[:, None] + 3 * step) % VOCAB  # row r counts in steps of r
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * lr_factor("cosine", step, max_steps=20)
        logits, aux = model(ids[:, :-1])
        loss = token_cross_entropy(logits, ids[:, 1:]).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + 0.01 * aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[3::4] == pytest.approx(EVERY_FOURTH_LOSS[kind], rel=1e-4)
