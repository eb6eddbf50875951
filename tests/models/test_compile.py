"""Compiled models: the same function, the same names in a checkpoint, and no recompilation while training."""

import pytest
import torch
from support.tiny_models import VOCAB, build
from torch._dynamo.utils import counters

from minigpt_pl.models.gpt import token_cross_entropy


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute:UserWarning")  # torch's own
@pytest.mark.parametrize("kind", ["classic", "dense", "switch"])
def test_compiled_training(kind):
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (build(kind, dropout=0.1).train() for _ in range(2))
    compiled.compile()
    graphs = []
    for step in range(6):
        ids = torch.randint(VOCAB, (4, 17), generator=torch.Generator().manual_seed(step))
        logits, aux = compiled(ids[:, :-1])
        (token_cross_entropy(logits, ids[:, 1:]).mean() + aux).backward()
        if step in (2, 5):  # an evaluation in between has a graph of its own
            compiled.eval()
            with torch.no_grad():
                checked = compiled(ids[:, :-1])[0]
                torch.testing.assert_close(checked, plain.eval()(ids[:, :-1])[0], atol=1e-5, rtol=0)
            compiled.train()
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[0], "recompiled while training"
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert all(p.grad is not None for p in compiled.parameters())
