"""The GPTs: blind to the future, initialised and learning as they should.

Their parts alone are in test_blocks and test_moe, parity with public models in test_parity, the losses of a training
run in training/test_golden.
"""

import math
from typing import Any

import pytest
import torch
from support.tiny_models import KINDS, VOCAB, build, lively, some_ids
from torch import Tensor

from minigpt_pl.generation.incremental import conv_fn, make_decode_fn
from minigpt_pl.models.attention import KVCache
from minigpt_pl.models.gpt import token_cross_entropy
from minigpt_pl.models.short_conv import CausalDepthwiseConv, ShortConv
from minigpt_pl.training.optim import OptimizerConfig, build_optimizer

# Causality: the past does not know the future. To the bit, but for experts: how many tokens share one decides how a
# product of matrices rounds.

EXACTNESS = [
    ("classic", torch.float32, 0.0),
    ("dense", torch.float32, 0.0),
    ("switch", torch.float32, 2e-5),
    ("switch", torch.float64, 1e-12),
    ("mixtral", torch.float32, 2e-5),
    ("mixtral", torch.float64, 1e-12),
]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("kind", "dtype", "rounding"), EXACTNESS)
def test_a_token_changes_no_earlier_logit(kind: str, dtype: torch.dtype, rounding: float, mode: str) -> None:
    model = lively(kind, dropout=0.2).to(dtype).train(mode == "train")
    ids = some_ids(2, 16)

    def logits(ids: Tensor) -> Tensor:
        torch.default_generator.manual_seed(5)  # the same dropout masks
        return model(ids)[0]

    before = logits(ids)
    for place in (1, 9, 15):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 7) % VOCAB
        after = logits(changed)
        assert (after[:, :place] - before[:, :place]).abs().max() <= rounding
        assert (after[:, place] - before[:, place]).abs().amax() > 0.01


@pytest.mark.parametrize(("kind", "dtype", "rounding"), EXACTNESS)
@torch.no_grad()
def test_what_a_cache_holds_of_the_past_does_not_know_the_future(
    kind: str, dtype: torch.dtype, rounding: float
) -> None:
    model, ids = lively(kind).to(dtype), some_ids(2, 16)

    def logits_after_rewinding(end: Tensor) -> Tensor:
        cache = model.new_cache()
        model(torch.cat([ids[:, :8], end], 1), cache)  # the past and a future in one piece
        for layer in cache:
            layer.length = 8
        step = make_decode_fn(model, cache)
        return torch.stack([step(ids[:, place]) for place in range(8, 16)], 1)

    one, other = (logits_after_rewinding(some_ids(2, 6, seed=seed)) for seed in (1, 2))
    assert (one - other).abs().max() <= rounding


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_changes_no_logit(kind: str) -> None:
    model, ids = lively(kind), some_ids(3, 16)
    for streams in (ids, ids[:1]):  # one stream chooses its experts another way
        whole, cache = model(streams)[0], model.new_cache()
        torch.testing.assert_close(model(streams[:, :5], cache)[0], whole[:, 4:5], atol=1e-4, rtol=0)
        step = make_decode_fn(model, cache)
        pieces = [step(streams[:, place]) for place in range(5, 16)]
        torch.testing.assert_close(torch.stack(pieces, 1), whole[:, 5:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_more_positions_than_the_block_size_are_refused(kind: str) -> None:
    model, cache = build(kind), build(kind).new_cache()
    with pytest.raises(AssertionError, match="block_size is 16"):
        model(some_ids(1, 17))
    model(some_ids(1, 16), cache)
    with pytest.raises(AssertionError, match="window is full"):
        make_decode_fn(model, cache)(some_ids(1, 1)[0])


# Initialisation.


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_come_from_their_seed_alone(kind: str) -> None:
    torch.manual_seed(1)
    first = build(kind, seed=3).state_dict()
    torch.manual_seed(2)
    torch.randn(7)
    again = build(kind, seed=3).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    other = build(kind, seed=4).state_dict()
    drawn = {name for name, weight in first.items() if weight.dim() >= 2 and weight.any()}
    assert drawn
    assert not any(torch.equal(other[name], first[name]) for name in drawn)


BEGIN_AT_0 = ("attention.out.weight", "feed_forward.down.weight", "conv_1.weight", "conv_2.weight", "head.weight")


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_have_the_published_spread(kind: str) -> None:
    model = build(kind, n_embd=64, n_layer=8, vocab_size=100, block_size=64)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or kind in ("recipes", "alternating") and name.endswith(BEGIN_AT_0):
            expected = 1 if "norm" in name and name.endswith("weight") or name.endswith("qk_gain") else 0
            assert (parameter == expected).all(), name
            continue
        to_residual = kind == "classic" and name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        std, error = (0.02 / 4 if to_residual else 0.02), 5 / math.sqrt(parameter.numel())
        assert abs(parameter.std().item() / std - 1) < error, name
        assert abs(parameter.mean().item() / std) < error, name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_initial_loss_is_that_of_a_guess(kind: str) -> None:
    model = build(kind, vocab_size=50)
    inputs, targets = some_ids(32, 16, vocab_size=50), some_ids(32, 16, seed=1, vocab_size=50)
    assert abs(token_cross_entropy(model(inputs)[0], targets).mean().item() - math.log(50)) < 0.05


@pytest.mark.parametrize("kind", ["recipes", "switch"])
@torch.no_grad()
def test_with_zero_init_blocks_pass_their_input_on_and_an_untied_head_knows_nothing(kind: str) -> None:
    model, ids = build(kind, zero_init=True), some_ids(2, 16)
    x = model.embed(ids)
    for block in model.blocks:
        assert torch.equal(block(x)[0], x)
    logits = model(ids)[0]
    expected = model.head(model.norm(x)) if kind == "switch" else torch.zeros_like(logits)
    assert torch.equal(logits, expected)
    assert logits.any() == (kind == "switch")


def test_an_untied_head_has_weights_of_its_own_and_counts_them() -> None:
    tied, untied = build("dense"), build("dense", tie_embeddings=False)
    assert untied.head.weight is not untied.token_embedding.weight
    assert untied.params_total() == tied.params_total() + VOCAB * 32
    assert untied.flops_per_token() == tied.flops_per_token()


@torch.no_grad()
def test_a_short_convolution_is_the_sum_of_its_taps() -> None:
    conv, x = ShortConv(2, 3), torch.randn(4, 6, 2)
    conv.weight.copy_(torch.tensor([[0.5, -1.0], [2.0, 0.0], [3.0, 4.0]]))
    for t in range(6):
        expected = x[:, t] * (1 + conv.weight[0])
        for back in (1, 2):
            if t >= back:
                expected = expected + x[:, t - back] * conv.weight[back]
        torch.testing.assert_close(conv(x)[:, t], expected)
    for prompt in (1, 4):
        cache = KVCache(6)
        torch.testing.assert_close(conv(x[:, :prompt], cache), conv(x)[:, :prompt])
        step = conv_fn(conv, cache)
        pieces = [step(x[:, t]) for t in range(prompt, 6)]
        torch.testing.assert_close(torch.stack(pieces, 1), conv(x)[:, prompt:])


@pytest.mark.parametrize("width", [1, 3])
def test_a_short_convolution_has_the_gradient_of_its_sum(width: int) -> None:
    for T in (7, 2, 1):
        x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, T, 3), (width, 3)))
        assert torch.autograd.gradcheck(CausalDepthwiseConv.apply, (x, weight))


def test_the_modern_head_is_the_embedding_and_the_classic_is_not() -> None:
    dense, classic = build("dense"), build("classic")
    assert dense.head.weight is dense.token_embedding.weight
    assert not torch.equal(classic.head.weight, classic.token_embedding.weight)


# Learning.


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_is_learned_by_heart(kind: str) -> None:
    model, ids = build(kind).train(), some_ids(4, 17)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.0, optimizer="adamw"))
    for _ in range(100):
        loss = token_cross_entropy(model(ids[:, :-1])[0], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def test_nll_is_that_of_the_target_and_nothing_where_there_is_none() -> None:
    logits = torch.tensor([[[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]])
    losses = token_cross_entropy(logits, torch.tensor([[1, -100]]))
    assert losses.tolist() == [[pytest.approx(math.log(math.e + math.e**2 + math.e**4) - 2), 0.0]]
    assert token_cross_entropy(logits.bfloat16(), torch.tensor([[1, 1]])).dtype == torch.float32


# Counting.


def test_parameters_and_flops_are_counted_as_by_hand() -> None:
    V, T, L, C = VOCAB, 16, 2, 32
    F = 2 * C
    classic, dense = build("classic"), build("dense")
    products = L * (4 * C * C + 8 * C * C) + V * C
    assert classic.params_total() == V * C + T * C + products + L * (9 * C + 4 * C) + 2 * C
    assert classic.params_active() == classic.params_total()
    assert classic.flops_per_token() == 6 * products + 12 * L * C * T
    products = L * (4 * C * C + 3 * C * F) + V * C
    assert dense.params_total() == products + (2 * L + 1) * C
    assert dense.flops_per_token() == 6 * products + 12 * L * C * T
    for kind, chosen in (("switch", 1), ("mixtral", 2)):
        moe, rest = build(kind), L * (4 * C * C + 4 * C) + V * C + (2 * L + 1) * C
        assert moe.params_total() == rest + L * 4 * 3 * C * F
        assert moe.params_active() == rest + L * chosen * 3 * C * F
        assert moe.flops_per_token() == 6 * (moe.params_active() - (2 * L + 1) * C) + 12 * L * C * T
    half, products = build("dense", attention_every=2), products - 4 * C * C
    assert half.params_total() == products + 2 * L * C
    assert half.flops_per_token() == 6 * products + 12 * C * T


@pytest.mark.parametrize(("every", "layers"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [1, 4]), (9, [4])])
def test_blocks_with_attention_are_counted_from_the_last(every: int, layers: list[int]) -> None:
    model = lively("recipes", n_layer=5, attention_every=every)
    assert model.attention_layers() == layers
    parts = {tuple(name.split(".")[1:3]) for name, _ in model.blocks.named_parameters(prefix="blocks")}
    for layer in range(5):
        for part in ("norm_1", "conv_1", "attention"):
            assert ((str(layer), part) in parts) == (layer in layers)
    ids = some_ids(1, 16)
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % VOCAB
    assert not torch.equal(model(ids)[0][0, -1], model(changed)[0][0, -1]), "the last position still sees the first"


# Sizes that make no model.


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_embd": 30}, "n_head 4: it must divide n_embd, 30"),
        ({"n_embd": 0}, "model.n_embd 0"),
        ({"n_layer": 0}, "model.n_layer 0"),
        ({"block_size": -1}, "model.block_size -1"),
        ({"dropout": 1.0}, "model.dropout 1.0"),
        ({"n_embd": 12}, "n_head 4: .* even width"),
        ({"rope_theta": 0.0}, "model.rope_theta 0.0"),
        ({"ffn_mult": 0.01}, "model.ffn_mult 0"),
        ({"conv_kernel_size": -1}, "model.conv_kernel_size -1"),
        ({"n_experts": -1}, "model.n_experts -1"),
        ({"n_experts": 4, "moe_top_k": 5}, "model.moe_top_k 5"),
        ({"n_experts": 4, "moe_top_k": 0}, "model.moe_top_k 0"),
        ({"n_experts": 4, "moe_gate": "softmax"}, "moe_gate is softmax"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build("dense", **change)
    if change.keys() <= {"n_layer", "block_size", "dropout"} or change == {"n_embd": 30}:
        with pytest.raises(ValueError, match=named):
            build("classic", **change)
