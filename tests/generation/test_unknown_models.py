"""A model that this package does not know is read by its own forward pass: its text is that of the model.

The package's own models, which are read one position at a time, are in test_generate.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.own_classes import MODULE
from support.tiny_models import KINDS, build, lively, redraw, some_ids
from torch import Tensor, nn

from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.generation.incremental import supports
from minigpt_pl.models.ablations import STAGES
from minigpt_pl.models.attention import KVCache, RotaryEmbedding
from minigpt_pl.models.blocks import Block
from minigpt_pl.models.config import GPTConfig, ModernConfig
from minigpt_pl.models.gpt import GPT, ModernGPT

SIZES: dict[str, Any] = {"vocab_size": 19, "block_size": 10, "n_layer": 2, "n_head": 4, "n_embd": 32, "dropout": 0.0}


class ScaledGPT(ModernGPT):
    """Another forward pass over the same parts."""

    def forward(self, ids: Tensor, cache: list[KVCache] | None = None) -> tuple[Tensor, Tensor]:
        logits, aux_loss = super().forward(ids, cache)
        return logits * torch.linspace(-1, 1, logits.size(-1)), aux_loss


class ReversedBlock(Block):
    """Negates what it adds."""

    def forward(self, x: Tensor, cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        y, aux_loss = super().forward(x, cache)
        return 2 * x - y, aux_loss


def scaled() -> GPT:
    model = ScaledGPT(ModernConfig(**SIZES), 1).eval()
    redraw(model)
    return model


def with_another_block() -> GPT:
    model = lively("dense", block_size=10)
    model.blocks[1].__class__ = ReversedBlock
    return model


def with_a_biased_head() -> GPT:
    model = lively("dense", block_size=10)
    weight, model.head = model.head.weight, nn.Linear(32, 19)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(torch.linspace(-2, 2, 19))
    return model


def with_other_positions_in_one_block() -> GPT:
    model: Any = lively("dense", block_size=10)
    model.blocks[1].attention.rope = RotaryEmbedding(8, 10, 2.0)
    return model


def with_a_hook() -> GPT:
    model = lively("dense", block_size=10)
    model.norm.register_forward_hook(lambda module, args, output: output.roll(1, -1))
    return model


def without_cache() -> GPT:
    """Its blocks are of a kind of their own, and cannot fill a cache."""
    names: dict[str, Any] = {"__file__": __file__, "__name__": "my_module"}
    exec(MODULE.replace("mark.exists() or ", "# "), names)
    return names["MeanGPT"](GPTConfig(**SIZES), 1).eval()


UNKNOWN = (
    scaled, with_another_block, with_a_biased_head, with_other_positions_in_one_block, with_a_hook, without_cache,
)  # fmt: skip


@torch.no_grad()
def continued(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens by the model's forward pass alone."""
    window, tokens = prompt[-10:], []
    for _ in range(count):
        tokens.append(int(model(torch.tensor([window]))[0][0, -1].argmax()))
        window.append(tokens[-1])
        window = window[-5:] if len(window) > 10 else window
    return tokens


@pytest.mark.parametrize("make", UNKNOWN, ids=lambda make: make.__name__)
def test_an_unknown_model_writes_what_its_forward_pass_says(make: Callable[[], GPT]) -> None:
    model, prompt = make(), some_ids(4).tolist()
    assert not supports(model)
    expected = continued(model, prompt, 25)
    assert [token for (token,) in generate(model, prompt, SamplingConfig(max_new_tokens=25, temperature=0))] == expected
    assert len(set(expected)) > 2
    if make is not without_cache:
        known = lively("dense", block_size=10)
        assert expected != continued(known, prompt, 25)


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_of_this_package_are_known(kind: str) -> None:
    assert supports(build(kind))


def test_every_stage_is_known() -> None:
    assert all(supports(stage(GPTConfig(**SIZES), 1)) for stage in STAGES.values())
