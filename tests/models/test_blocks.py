"""The parts of the models alone: dropout by its statistics, attention against its formula, norm, rotary positions.

Dropout has a way of its own on a CPU and torch's elsewhere; both are run here.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minigpt_pl.models import attention, dropout
from minigpt_pl.models.attention import RotaryEmbedding, apply_rotary, attend, split_qkv_heads, unit_rms
from minigpt_pl.models.blocks import MLP, SwiGLU, swiglu
from minigpt_pl.models.dropout import Dropout


@pytest.fixture(params=["cpu", "elsewhere"])
def _masks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks drawn as on a CPU, and as on any other device."""
    if request.param == "elsewhere":
        for room in (attention, dropout):
            monkeypatch.setattr(room, "use_cpu_ops", lambda x: False)


both_ways = pytest.mark.usefixtures("_masks")


def reseed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


# Dropout.


@both_ways
@pytest.mark.parametrize("p", [0.1, 0.24, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_scales_the_rest(p: float) -> None:
    reseed(1)
    count = 400_000
    y = Dropout(p)(torch.ones(count // 100, 100))
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)


def test_dropout_of_nearly_all_keeps_next_to_nothing() -> None:
    assert (Dropout(1 - 2**-18)(torch.ones(100_000)) != 0).float().mean() < 0.001


@both_ways
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_masks_are_independent(p: float) -> None:
    reseed(2)
    dropout, count = Dropout(p), 400_001  # odd: also what does not fill a whole random number
    first, second = (((dropout(torch.ones(count)) != 0).float() - (1 - p)) / math.sqrt(p * (1 - p)) for _ in range(2))
    bound = 5 / math.sqrt(count)
    for lag in (1, 2, 3, 4, 5, 8, 16, 64, 1000):
        assert abs((first[lag:] * first[:-lag]).mean().item()) < bound, f"elements {lag} apart"
    assert abs((first * second).mean().item()) < bound, "the same element of two calls"
    for place in range(4):  # no place among the neighbours that share a random number is special
        assert abs(first[place::4].mean().item()) < 2 * bound


@both_ways
def test_dropout_repeats_under_the_same_seed_and_only_then() -> None:
    x, dropout = torch.ones(50, 50), Dropout(0.3)
    draws = []
    for seed in (7, 7, 8):
        reseed(seed)
        draws.append(dropout(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[2], dropout(x))


@both_ways
def test_the_gradient_passes_where_the_element_did() -> None:
    x = torch.full((30, 30), 2.0, requires_grad=True)
    y = Dropout(0.4)(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.detach() / 2)


@both_ways
@pytest.mark.parametrize("dropout", [Dropout(0.0), Dropout(0.5).eval()])
def test_dropout_that_is_off_changes_nothing_and_draws_nothing(dropout: Dropout) -> None:
    x, state = torch.randn(9, 9), torch.get_rng_state()
    assert torch.equal(dropout(x), x)
    q = torch.randn(1, 2, 9, 4)
    state = torch.get_rng_state()
    torch.testing.assert_close(attend(q, q, q, dropout), F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_dropout_outside_its_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=f"dropout is {p}"):
        Dropout(p)


# Attention.


def dropped_probabilities(q: Tensor, k: Tensor, dropout: Dropout) -> Tensor:
    """What `attend` multiplies the values by: values that are one-hot by position show it."""
    return attend(q, k, torch.eye(q.size(2)).expand_as(q), dropout)


@both_ways
@pytest.mark.parametrize("T", [5, 64, 70, 130])
def test_attention_with_dropout_is_its_formula_and_so_are_its_gradients(T: int) -> None:
    q, k, v, direction = (torch.randn(2, 2, T, T, generator=torch.Generator().manual_seed(i)) for i in range(4))
    dropout, future = Dropout(0.3), torch.ones(T, T, dtype=torch.bool).triu(1)
    reseed(3)
    shown = dropped_probabilities(q, k, dropout)
    results = []
    for by_hand in (False, True):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        reseed(3)
        if by_hand:
            probs = (inputs[0] @ inputs[1].mT / math.sqrt(T)).masked_fill(future, -math.inf).softmax(-1)
            y = (probs * (shown != 0) / 0.7) @ inputs[2]
        else:
            y = attend(*inputs, dropout)
        y.backward(direction)
        results.append([y.detach(), *(x.grad for x in inputs)])
    dropped = (shown == 0)[:, :, ~future]
    assert abs(dropped.float().mean().item() - 0.3) < 5 * math.sqrt(0.21 / dropped.numel())
    assert (shown[:, :, future] == 0).all()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@both_ways
def test_dropout_keeps_what_attention_expects() -> None:
    T, draws = 12, 3000
    q, k, v = (torch.randn(1, 1, T, T, generator=torch.Generator().manual_seed(i)) for i in range(3))
    reseed(4)
    y = attend(*(x.expand(draws, -1, -1, -1).contiguous() for x in (q, k, v)), Dropout(0.4))
    expected = attend(q, k, v, Dropout(0.0))[0]
    spread = y.std(0)
    assert (spread > 0).all()
    assert ((y.mean(0) - expected).abs() < 5 * spread / math.sqrt(draws)).all()
    assert not torch.equal(y[0], y[1]), "each row has its own mask"


def test_in_bf16_the_masks_are_those_of_fp32_and_the_rest_is_rounding() -> None:
    q, k, v, direction = (torch.randn(2, 3, 130, 16, generator=torch.Generator().manual_seed(i)) for i in range(4))
    results = []
    for kind in (torch.float32, torch.bfloat16):
        inputs = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        reseed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16):
            y = Dropout(0.25)(attend(*inputs, Dropout(0.3)))
        y.backward(direction.to(kind))
        results.append([y.detach(), *(x.grad for x in inputs)])
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype is torch.bfloat16
        assert 0 < (rounded.float() - exact).norm() / exact.norm() < 0.03


# Norm and feed-forward nets.


def test_the_norm_of_the_modern_model_is_torchs_and_so_are_its_gradients() -> None:
    from support.tiny_models import lively

    norm = lively("dense").norm
    x, direction = (torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(i)) * 3 for i in range(2))
    results = []
    for ours in (True, False):
        x, norm.weight.grad = x.detach().clone().requires_grad_(), None
        y = norm(x) if ours else F.rms_norm(x, (32,), norm.weight, 1e-5)
        y.backward(direction)
        results.append([y.detach(), x.grad, norm.weight.grad])
    with torch.no_grad():  # a third way of computing it
        results[0].append(norm(x))
        results[1].append(results[1][0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hidden", [8, 5])
def test_the_gradient_of_swiglu_is_that_of_its_formula(hidden: int) -> None:
    """On a CPU it has a way of its own where gradients are needed."""
    gate_up, direction = torch.randn(3, 7, 2 * hidden), torch.randn(3, 7, hidden)
    results = []
    for formula in (swiglu, lambda x: x[..., :hidden] * x[..., :hidden].sigmoid() * x[..., hidden:]):
        gate_up = gate_up.detach().clone().requires_grad_()
        y = formula(gate_up)
        y.backward(direction)
        results.append([y.detach(), gate_up.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_the_norm_of_queries_and_keys_is_torchs_and_so_are_its_gradients() -> None:
    x, direction = (torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(i)) * 3 for i in range(2))
    results = []
    for norm in (unit_rms, lambda x, gain, eps: F.rms_norm(x, (8,), eps=eps) * gain):
        x, gain = x.detach().clone().requires_grad_(), torch.full((1,), 0.7, requires_grad=True)
        y = norm(x, gain, 0.5)
        y.backward(direction)
        results.append([y.detach(), x.grad, gain.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("compiling", [False, True], ids=["ours", "torch's"])
def test_the_norm_of_queries_and_keys_keeps_their_dtype(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else attention would mix dtypes: values are not normalised."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    gain = torch.full((1,), 0.7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = unit_rms(x, gain, 1e-5)
    y.sum().backward()
    assert (y.dtype, gain.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), F.rms_norm(x.float(), (8,), eps=1e-5) * 0.7, atol=0.02, rtol=0.02)


def test_normalised_queries_and_keys_are_so_before_and_after_the_rotation() -> None:
    """A head's scores are the cosines of its queries and keys, times sqrt(D) and the gain's square."""
    from support.tiny_models import lively

    attention: Any = lively("qk_norm", rms_norm_eps=1e-12).blocks[0].attention
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    qkv = attention.qkv(x).view(2, 5, 3, 4, 8)
    q, k, v = split_qkv_heads(qkv, attention.rope)
    scores = F.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), dim=-1) * math.sqrt(8) * attention.qk_gain**2
    weights = scores.masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf).softmax(-1)
    expected = attention.out((weights @ v).transpose(1, 2).reshape(2, 5, 32))
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        attention.qkv.weight[:64] *= 7
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)


def test_a_norm_adds_its_epsilon_under_the_root() -> None:
    from support.tiny_models import build

    norm = build("dense", rms_norm_eps=0.5).norm
    x = torch.full((1, 32), 2.0)
    assert norm(x)[0, 0].item() == pytest.approx(2 / math.sqrt(4.5))


@torch.no_grad()
def test_feed_forward_nets_are_their_formulas() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 3
    gelu, swiglu = MLP(8), SwiGLU(8, 12)
    up = gelu.up(x).double()
    tanh_form = up / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    torch.testing.assert_close(gelu(x), gelu.down(tanh_form.float()), atol=1e-6, rtol=0)
    gate, up = x @ swiglu.gate_up.weight[:12].T, x @ swiglu.gate_up.weight[12:].T
    torch.testing.assert_close(swiglu(x), (gate * gate.sigmoid() * up) @ swiglu.down.weight.T, atol=1e-6, rtol=0)


# Heads and rotary positions.


def turned(rope: RotaryEmbedding, x: Tensor) -> Tensor:
    """The one head x (T, D), rotated; what is not a query or key is not."""
    q, k, v = split_qkv_heads(x[None, :, None, None].expand(1, -1, 3, 1, -1), rope)
    assert torch.equal(v[0, 0], x)
    assert torch.equal(q, k)
    return q[0, 0]


@both_ways
def test_rotated_products_depend_on_the_distance_alone() -> None:
    rope = RotaryEmbedding(head_width=8, block_size=32, theta=100.0)
    q, k = (torch.randn(8, generator=torch.Generator().manual_seed(i)).expand(32, 8) for i in range(2))
    scores = turned(rope, q) @ turned(rope, k).T  # (T, T)
    for distance in (0, 1, 5, 20):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-4, rtol=0)
    assert (scores[20, 0] - scores[20, 20]).abs() > 0.1


@both_ways
def test_one_position_is_turned_as_among_others() -> None:
    rope, x = RotaryEmbedding(head_width=8, block_size=32, theta=100.0), torch.randn(30, 8)
    torch.testing.assert_close(apply_rotary(x[11], rope.cos[11], rope.sin[11]), turned(rope, x)[11])
    torch.testing.assert_close(turned(rope, x)[0], x[0])


@both_ways
def test_rotary_halves_turn_by_the_published_angles() -> None:
    x = turned(
        RotaryEmbedding(head_width=4, block_size=8, theta=100.0), torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(8, 4)
    )
    for place in (0, 1, 7):
        for low, rate in ((0, 1.0), (1, 0.1)):  # theta ** -(0 / 4), theta ** -(2 / 4)
            turn = complex(low + 1, low + 3) * complex(math.cos(place * rate), math.sin(place * rate))
            assert x[place, [low, low + 2]].tolist() == pytest.approx([turn.real, turn.imag], abs=1e-5)


def test_heads_split_in_few_passes_have_the_gradient_of_those_split_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rope, direction = RotaryEmbedding(head_width=6, block_size=9, theta=100.0), torch.randn(3, 2, 4, 7, 6)
    results = []
    for quick in (True, False):
        monkeypatch.setattr(attention, "use_cpu_ops", lambda x, quick=quick: quick)
        qkv = torch.randn(2, 7, 3, 4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        heads = torch.stack(split_qkv_heads(qkv, rope))
        (heads * direction).sum().backward()
        assert qkv.grad is not None
        results.append((heads.detach(), qkv.grad))
    for quick, slow in zip(*results, strict=True):
        torch.testing.assert_close(quick, slow)
        assert not torch.equal(slow[..., 1, :], slow[..., 2, :])
