"""Parity with a classic decoder of torch's own modules, written here as the reference report's program builds its own.

Our options for it are gelu exact, weight_init torch and attention_output_dropout false. Parity with Hugging Face's
models is in test_parity.
"""

import re
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, build, redraw, some_ids
from torch import Tensor, nn
from torch.nn import functional as F

OPTIONS: dict[str, Any] = {"gelu": "exact", "weight_init": "torch", "attention_output_dropout": False}


class TwinBlock(nn.Module):
    def __init__(self, C: int, n_head: int, dropout: float):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attention = nn.MultiheadAttention(C, n_head, dropout, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C), nn.Dropout(dropout))

    def forward(self, x: Tensor, future: Tensor) -> Tensor:
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]
        return x + self.feed_forward(self.norm_2(x))


class Twin(nn.Module):
    def __init__(self, C: int, n_head: int, n_layer: int, block_size: int, dropout: float = 0.0):
        super().__init__()
        self.token_embedding, self.position_embedding = nn.Embedding(VOCAB, C), nn.Embedding(block_size, C)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TwinBlock(C, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        T = ids.size(1)
        x = self.dropout(self.token_embedding(ids) + self.position_embedding(torch.arange(T)))
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        for block in self.blocks:
            x = block(x, future)
        return self.head(self.norm(x))


def twin_name(ours: str) -> str:
    names = {"qkv.": "in_proj_", "out.": "out_proj.", "up.": "0.", "down.": "2."}
    for our_part, their_part in names.items():
        ours = ours.replace(f".{our_part}", f".{their_part}")
    return ours


def twin_of(model: nn.Module, dropout: float = 0.0) -> Twin:
    """The twin of a model of `build`, with its weights."""
    twin = Twin(32, 4, 2, 16, dropout)
    twin.load_state_dict({twin_name(name): weight for name, weight in model.state_dict().items()})
    return twin.train(model.training)


def test_logits_and_gradients_are_those_of_torchs_modules() -> None:
    ours = build("classic", **OPTIONS)
    redraw(ours)
    theirs, ids = twin_of(ours), some_ids(3, 17)
    ours_and_theirs = []
    for model in (lambda x: ours(x)[0], theirs):
        logits = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        ours_and_theirs.append(logits)
    assert ours_and_theirs[1].std() > 0.5, "logits this small would agree by themselves"
    torch.testing.assert_close(*ours_and_theirs, atol=1e-5, rtol=0)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[twin_name(name)], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("nonzero", "drops", "drops_as_gpt2"),
    [
        (("embedding",), True, True),
        (("qkv", "out.weight"), True, True),  # the probabilities; what they weight is the same at all positions
        (("out.bias",), False, True),
        (("down.bias",), True, True),
        (("norm.bias",), False, False),
    ],
)
def test_dropout_has_the_same_places(nonzero: tuple[str, ...], drops: bool, drops_as_gpt2: bool) -> None:
    """Only one place has anything to drop: all weights are zero but those, the norms' and the head's."""
    ids = some_ids(8, 16)
    for options, expected in (OPTIONS, drops), ({}, drops_as_gpt2):
        model = build("classic", dropout=0.5, **options)
        redraw(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not any(part in name for part in (*nonzero, "norm_", "norm.weight", "head")):
                    parameter.zero_()
        twin = twin_of(model, dropout=0.5)
        calm = model(ids)[0]
        assert calm.abs().max() > 0.1, "nothing here could be dropped"
        assert (not torch.allclose(model.train()(ids)[0], calm, atol=1e-5)) == expected
        if options:
            assert (not torch.allclose(twin.train()(ids), calm, atol=1e-5)) == expected


def by_kind(model: nn.Module) -> dict[str, Tensor]:
    """All numbers of the parameters of one name, over the blocks."""
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        kind = re.sub(r"^blocks\.\d+\.", "", twin_name(name))
        kinds.setdefault(kind, []).append(parameter.detach().flatten())
    return {kind: torch.cat(numbers) for kind, numbers in kinds.items()}


def largest_gap(one: Tensor, other: Tensor) -> float:
    """The two-sample statistic of Kolmogorov and Smirnov."""
    places = torch.cat([one, other]).sort().values
    shares = [torch.searchsorted(x.sort().values, places, right=True) / len(x) for x in (one, other)]
    return (shares[0] - shares[1]).abs().max().item()


def test_initial_weights_are_distributed_as_those_of_torchs_modules() -> None:
    ours = by_kind(build("classic", n_embd=64, n_layer=4, block_size=64, **OPTIONS))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = by_kind(Twin(64, 4, 4, 64))
    assert ours.keys() == theirs.keys()
    for name, numbers in ours.items():
        if theirs[name].std() == 0:
            assert torch.equal(numbers, theirs[name]), name
            continue
        assert largest_gap(numbers, theirs[name]) < 1.95 * (2 / len(numbers)) ** 0.5, name  # by chance one in 1000
        assert numbers.std().item() == pytest.approx(theirs[name].std().item(), rel=3 * len(numbers) ** -0.5), name
        if "embedding" not in name:  # uniform, with sharp ends
            assert numbers.abs().max().item() == pytest.approx(theirs[name].abs().max().item(), rel=0.02), name


def test_initial_weights_come_from_their_seed_alone() -> None:
    one, same, other = (build("classic", **OPTIONS, seed=seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.std() == 0 or not torch.equal(a, c), name
    drawn = [p.flatten()[:32] for p in one.parameters() if p.std() > 0]
    assert len({tuple(p.tolist()) for p in drawn}) == len(drawn), "two parameters begin alike"
