"""The mixture of experts against a loop over tokens, and what its router learns from."""

from typing import Any

import pytest
import torch
from support.tiny_models import lively, redraw, some_ids
from torch import Tensor
from torch.nn import functional as F

from minigpt_pl.models.moe import MoE, RouterGate

C, HIDDEN, E = 8, 12, 4
GATES: tuple[RouterGate, ...] = ("softmax_all", "softmax_selected")


def experts(top_k: int, gate: RouterGate) -> MoE:
    moe = MoE(C, HIDDEN, E, top_k, gate)
    redraw(moe, std=0.5)
    return moe


def one_by_one(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: each token asks its experts one after the other."""
    rows, share, probability = [], torch.zeros(E), torch.zeros(E)
    tokens = x.flatten(0, 1)
    for token in tokens:
        logits = moe.router.weight @ token
        chosen = logits.argsort(descending=True)[: moe.top_k]
        of_all, of_chosen = logits.exp() / logits.exp().sum(), logits[chosen].exp() / logits[chosen].exp().sum()
        row = torch.zeros(C)
        for place, e in enumerate(chosen.tolist()):
            up = moe.gate_up[e] @ token
            hidden = up[:HIDDEN] * up[:HIDDEN].sigmoid() * up[HIDDEN:]
            weight = of_all[e] if moe.gate == "softmax_all" else of_chosen[place]
            row = row + weight * (moe.down[e] @ hidden)
            share[e] += 1 / (moe.top_k * len(tokens))
        rows.append(row)
        probability = probability + of_all / len(tokens)
    return torch.stack(rows).view_as(x), E * (share * probability).sum()


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 13)])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_output_and_gradients_are_those_of_a_loop_over_tokens(
    top_k: int, gate: RouterGate, shape: tuple[int, int]
) -> None:
    moe = experts(top_k, gate)
    data, direction = (torch.randn(*shape, C, generator=torch.Generator().manual_seed(i)) for i in range(2))
    results = []
    for ours in (True, False):
        x = data.clone().requires_grad_()
        y, aux = moe(x) if ours else one_by_one(moe, x)
        gradients = torch.autograd.grad((y * direction).sum() + 0.7 * aux, [x, *moe.parameters()])
        results.append([y.detach(), aux.detach(), *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(moe(data)[0], results[1][0], atol=1e-5, rtol=1e-5)


# The balance loss.


def route_by_direction(moe: MoE) -> None:
    """Expert e has all but certainty for a token that points along e."""
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(E, C) * 30)


@pytest.mark.parametrize("gate", GATES)
def test_the_aux_loss_is_one_when_experts_share_alike_and_their_number_when_one_has_all(gate: RouterGate) -> None:
    moe, directions = MoE(C, HIDDEN, E, 1, gate), torch.eye(E, C)
    redraw(moe)
    route_by_direction(moe)
    assert moe(directions.repeat(5, 1, 1))[1].item() == pytest.approx(1)
    assert moe(directions[2].expand(5, 7, C))[1].item() == pytest.approx(E)
    assert moe.last_routing is not None
    assert [part.tolist() for part in moe.last_routing] == [[0, 0, 1, 0], pytest.approx([0, 0, 1, 0])]
    two = MoE(C, HIDDEN, E, 2, gate)
    redraw(two)
    route_by_direction(two)
    evenly = torch.stack([directions[a] + directions[b] for a, b in ((0, 1), (1, 2), (2, 3), (3, 0))])
    assert two(evenly.repeat(5, 1, 1))[1].item() == pytest.approx(1)
    assert two(evenly[:1].expand(5, 7, C))[1].item() == pytest.approx(E / 2)  # both choices of a token count
    assert two.last_routing is not None
    assert two.last_routing[0].tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("kind", ["switch", "mixtral"])
def test_the_aux_loss_of_a_model_is_the_sum_over_its_layers(kind: str) -> None:
    model = lively(kind, n_layer=3)
    for moe in model.moe_layers():
        moe.router.weight.detach().zero_()  # uniform probabilities: 1 a layer, whichever experts are taken
    assert model(some_ids(2, 16))[1].item() == pytest.approx(3)
    assert lively("dense")(some_ids(2, 16))[1].item() == 0


# What the router learns from.


def cross_entropy_gradients(
    gate: RouterGate, dtype: torch.dtype = torch.float32
) -> tuple[Any, Tensor, Tensor, list[Tensor]]:
    """A top-1 model, a batch, the gradients of the cross-entropy alone in its last router and its experts."""
    model = lively("switch", moe_gate=gate).to(dtype)
    ids = some_ids(2, 17)
    moe = list(model.moe_layers())[-1]
    loss = F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
    router, *rest = torch.autograd.grad(loss, [moe.router.weight, moe.gate_up, moe.down])
    return model, ids, router, rest


def test_at_top_1_the_router_learns_from_the_text_alone() -> None:
    _, _, router, rest = cross_entropy_gradients("softmax_all")
    assert router.norm() > 1e-3 * torch.cat([part.flatten() for part in rest]).norm()


def test_the_routers_gradient_agrees_with_finite_differences() -> None:
    model, ids, router, _ = cross_entropy_gradients("softmax_all", torch.float64)
    moe = list(model.moe_layers())[-1]
    direction, size = router / router.norm(), 1e-3
    losses, shares = [], []
    with torch.no_grad():
        for sign in (1, -2):
            moe.router.weight.add_(sign * size * direction)
            losses.append(F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten()).item())
            shares.append(moe.last_routing[0].tolist())
    assert shares[0] == shares[1], "a token that changes its expert has no gradient to compare"
    assert (losses[0] - losses[1]) / (2 * size) == pytest.approx(router.norm().item(), rel=0.01)


def test_softmax_over_the_chosen_alone_teaches_a_top_1_router_nothing() -> None:
    _, _, router, rest = cross_entropy_gradients("softmax_selected")
    assert (router == 0).all()
    assert all(part.abs().max() > 0 for part in rest)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_that_nobody_chose_gets_no_gradient(top_k: int, gate: RouterGate) -> None:
    moe = experts(top_k, gate)
    route_by_direction(moe)
    with torch.no_grad():
        moe.router.weight[2] = -30
    noise = torch.rand(20, 3, C, generator=torch.Generator().manual_seed(0)) * 0.1
    y, _ = moe(torch.eye(E, C)[[0, 1, 3]] + noise)
    y.square().sum().backward()
    for weights in (moe.gate_up, moe.down):
        assert weights.grad is not None
        assert weights.grad.abs().amax((1, 2)).gt(0).tolist() == [True, True, False, True]


def test_nothing_is_lost_when_all_choose_the_same_expert() -> None:
    moe = MoE(C, HIDDEN, E, 1, "softmax_selected")
    redraw(moe)
    route_by_direction(moe)
    x = torch.eye(E, C)[3] + torch.randn(64, 2, C, generator=torch.Generator().manual_seed(0)) * 0.01
    y, _ = moe(x)
    gate, up = F.linear(x, moe.gate_up[3]).chunk(2, -1)
    torch.testing.assert_close(y, F.linear(F.silu(gate) * up, moe.down[3]))
    assert y.norm(dim=-1).min() > 0


@pytest.mark.parametrize("width", [C, C + 4])  # with a grouped product, and without
def test_autocast_is_for_experts_what_it_is_for_other_products(width: int) -> None:
    moe = MoE(width, HIDDEN, E, 1, "softmax_all")
    redraw(moe)
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(0))
    exact, _ = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = moe(x)
    assert rounded.dtype is torch.bfloat16
    assert 0 < (rounded.float() - exact).norm() / exact.norm() < 0.05
    rounded.sum().backward()
    assert moe.gate_up.grad is not None
    assert moe.gate_up.grad.dtype is torch.float32
