"""Compiled models: the same function, the same names in a checkpoint, and no recompilation while training."""

import pytest
import torch
from torch._dynamo.utils import counters

from minigpt_pl.models.gpt import GPT, ClassicGPT, ModernGPT, token_cross_entropy

SIZES = {"vocab_size": 11, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}


def build(kind: str) -> GPT:
    if kind == "classic":
        return ClassicGPT(**SIZES, dropout=0.1, seed=1)
    experts = 4 if kind == "moe" else 0
    return ModernGPT(
        **SIZES, dropout=0.1, rope_theta=1e4, rms_norm_eps=1e-6, ffn_mult=2.0, n_experts=experts, moe_top_k=1,
        moe_gate="softmax_all", seed=1, tie_embeddings=True, zero_init=False, conv_kernel_size=0,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute:UserWarning")  # torch's own
@pytest.mark.parametrize("kind", ["classic", "modern", "moe"])
def test_compiled_training(kind):
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = build(kind), build(kind)
    compiled.compile()
    graphs = []
    for step in range(6):
        ids = torch.randint(11, (4, 17), generator=torch.Generator().manual_seed(step))
        logits, aux = compiled(ids[:, :-1])
        (token_cross_entropy(logits, ids[:, 1:]).mean() + aux).backward()
        if step in (2, 5):  # a check in between is the other of the two graphs
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
