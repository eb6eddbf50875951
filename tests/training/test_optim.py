"""How weights are updated: every parameter once, AdamW by its formula, the learning rate by literal lists."""

import math

import pytest
import torch
from support.tiny_models import KINDS, VOCAB, build, lively, some_ids

from minigpt_pl.models.gpt import token_cross_entropy
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.lit_modules import ClassicLM
from minigpt_pl.training.optim import (
    ORTHOGONALIZING_POLYNOMIALS,
    Muon,
    OptimizerConfig,
    build_optimizer,
    check_param_groups,
    lr_factor,
    orthogonalize,
)

EXPERTS = ("gate_up", "down")


def adamw(lr: float, weight_decay: float) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, weight_decay=weight_decay, optimizer="adamw")


def muon(lr: float, weight_decay: float) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, muon_lr=lr, weight_decay=weight_decay, optimizer="muon")


def one_step(kind: str, lr: float, weight_decay: float, steps: int = 1) -> tuple[dict, dict, dict]:
    """Parameters before the last of some steps, its gradients, parameters after it; by name."""
    model, ids = lively(kind).train(), some_ids(4, 17)
    optimizer = build_optimizer(model, adamw(lr, weight_decay))
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        logits, aux = model(ids[:, :-1])
        (token_cross_entropy(logits, ids[:, 1:]).mean() + aux).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return before, gradients, {name: p.detach() for name, p in model.named_parameters()}


# Parameters.


@pytest.mark.parametrize("kind", KINDS)
def test_each_parameter_is_in_exactly_one_group_tied_ones_once(kind: str) -> None:
    model = build(kind)
    optimizer = build_optimizer(model, adamw(1e-3, 0.1))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    }
    assert sum(p.numel() for p in grouped) == model.params_total()
    assert all(group["weight_decay"] == 0.1 and group["lr"] == 1e-3 for group in optimizer.param_groups)


def test_a_parameter_that_no_group_has_or_two_have_is_noticed() -> None:
    some = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    check_param_groups(torch.optim.SGD(some), some)
    with pytest.raises(AssertionError, match="exactly one group"):
        check_param_groups(torch.optim.SGD(some[:2]), some)
    with pytest.raises(AssertionError, match="exactly one group"):
        check_param_groups(torch.optim.SGD(some), [*some, some[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_moves_every_parameter(kind: str) -> None:
    before, gradients, after = one_step(kind, lr=1e-2, weight_decay=0.0)
    assert gradients.keys() == before.keys()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still


# The update.


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_adamws_with_decay_on_every_parameter(kind: str) -> None:
    lr, decay = 1e-2, 0.3
    before, gradients, after = one_step(kind, lr, decay)
    for name, gradient in gradients.items():
        expected = before[name] * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-5)


def test_later_steps_have_torchs_default_betas() -> None:
    torch.manual_seed(0)
    weight, lr, m, v = torch.nn.Parameter(torch.ones(3)), 0.1, torch.zeros(3), torch.zeros(3)
    optimizer = build_optimizer(torch.nn.ParameterList([weight]), adamw(lr, 0.0))
    expected = weight.detach().clone()
    for step in range(1, 6):
        weight.grad = torch.tensor([1.0, -2.0, 0.5]) * step
        m, v = 0.9 * m + 0.1 * weight.grad, 0.999 * v + 0.001 * weight.grad**2
        expected -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)


# Muon.


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 85), (3, 64, 24)])
def test_orthogonal_keeps_the_singular_vectors_and_brings_the_values_near_1(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    [got] = orthogonalize(matrix)
    in_its_frame = u.mT @ got @ vh.mT
    values = in_its_frame.diagonal(dim1=-2, dim2=-1)
    assert (in_its_frame - torch.diag_embed(values)).abs().max() < 1e-3
    assert values.min() > 0.5
    assert values.max() < 1.1


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-18, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("rank", [1, 8])
def test_orthogonal_matrices_are_finite_and_of_the_same_size_for_gradients_of_any_size(size: float, rank: int) -> None:
    """The gradients of a new model are 0 behind outputs that start at 0, and tiny a step later."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(16, rank, generator=generator), torch.randn(rank, 8, generator=generator)
    [got] = orthogonalize(factors[0] @ factors[1] * size)
    assert got.isfinite().all()
    if size > 1e-18:
        torch.testing.assert_close(got, orthogonalize(factors[0] @ factors[1])[0], atol=2e-3, rtol=1e-3)


def test_stacks_of_any_shapes_are_orthogonalised_together_as_alone() -> None:
    shapes = [(2, 12, 6), (6, 9), (3, 2, 5, 6), (1, 5, 8), (4, 6, 6)]  # shorter sides 6, 6, 5, 5, 6
    stacks = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    for together, stack in zip(orthogonalize(*stacks), stacks, strict=True):
        torch.testing.assert_close(together, orthogonalize(stack)[0], atol=1e-5, rtol=1e-5)


def test_the_polynomials_are_the_best_of_their_kind() -> None:
    """Each has the least error that degree 5 allows on what the one before it leaves: it is attained four times."""
    low, high = 0.02, 1.0
    for a, b, c in ORTHOGONALIZING_POLYNOMIALS:
        x = torch.linspace(low, high, 100_001, dtype=torch.float64)
        error = 1 - (a * x + b * x**3 + c * x**5)
        largest = error.abs().max().item()
        peaks = error[error.abs() > 0.99 * largest].sign()
        assert int((peaks.diff() != 0).sum()) == 3, "alternating signs: Chebyshev's condition"
        low, high = 1 - largest, 1 + largest
    assert largest < 0.1


def reference_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """As the paper has it, one step after the other."""
    values = torch.linalg.svdvals(matrix.double())
    x = matrix.double() / (values**8).sum() ** (1 / 8) / math.sqrt(1.001)
    for a, b, c in ORTHOGONALIZING_POLYNOMIALS:
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


def test_muon_is_its_formula_and_leaves_the_rest_to_adamw() -> None:
    lr, decay, generator = 0.1, 0.3, torch.Generator().manual_seed(0)
    model = torch.nn.Linear(4, 6)
    weight, bias = model.weight, model.bias
    model.matrices = lambda: [weight]
    other = torch.nn.Parameter(bias.detach().clone())
    optimizer, reference = (
        build_optimizer(model, muon(lr, decay)),
        torch.optim.AdamW([other], lr=lr, weight_decay=decay),
    )
    expected, momentum, rows = weight.detach().clone(), torch.zeros(6, 4), torch.zeros(6, 1)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
        other.grad = bias.grad.clone()
        momentum = 0.95 * momentum + 0.05 * weight.grad
        update = reference_orthogonal(0.95 * momentum + 0.05 * weight.grad).float()
        rows = 0.95 * rows + 0.05 * update.square().mean(1, keepdim=True)
        even = update / rows.sqrt() * update.norm() / (update / rows.sqrt()).norm()
        expected = expected * (1 - lr * decay) - lr * math.sqrt(6 / 4) * even
        optimizer.step()
        reference.step()
        torch.testing.assert_close(weight.detach(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bias, other)


def test_muon_treats_each_expert_as_a_matrix_of_its_own() -> None:
    stack = torch.nn.Parameter(torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1)))
    alone = [torch.nn.Parameter(expert.detach().clone()) for expert in stack]
    stack.grad = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(2))
    for expert, gradient in zip(alone, stack.grad, strict=True):
        expert.grad = gradient.clone()
    for parameters in ([stack], alone):
        Muon([{"params": parameters, "use_muon": True}], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(stack, torch.stack(alone), atol=1e-6, rtol=1e-5)


def test_muon_leaves_matrices_without_a_gradient_alone() -> None:
    still, moving = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = Muon([{"params": [still], "use_muon": True}, {"params": [moving], "use_muon": False}], lr=0.1)
    moving.grad = torch.ones(3, 2)
    optimizer.step()
    assert torch.equal(still, torch.ones(3, 2))
    assert not torch.equal(moving, torch.ones(3, 2))
    assert still not in optimizer.state


@pytest.mark.parametrize(
    ("kind", "feed_forward"),
    [("classic", ("up.weight", "down.weight")), ("recipes", ("gate_up.weight", "down.weight")), ("switch", EXPERTS)],
)
def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_the_rest(kind: str, feed_forward: tuple[str, ...]) -> None:
    model, ids = lively(kind).train(), some_ids(4, 17)
    optimizer, names = build_optimizer(model, muon(1e-2, 0.1)), {p: name for name, p in model.named_parameters()}
    mine = {"attention.qkv.weight", "attention.out.weight", *(f"feed_forward.{name}" for name in feed_forward)}
    logits, aux = model(ids[:, :-1])
    (token_cross_entropy(logits, ids[:, 1:]).mean() + aux).backward()
    optimizer.step()
    by_rule = {
        rule: sorted(names[p] for p in optimizer.state if key in optimizer.state[p])
        for rule, key in {"muon": "momentum", "adamw": "exp_avg"}.items()
    }
    assert by_rule["muon"] == sorted(f"blocks.{layer}.{name}" for layer in range(2) for name in mine)
    assert sorted(by_rule["muon"] + by_rule["adamw"]) == sorted(names.values())


# The learning rate: that of the update after `step` completed ones, in units of its peak.


@pytest.mark.parametrize(
    ("max_steps", "factors"),
    [
        (100, {0: 0.02, 1: 0.04, 24: 0.5, 48: 0.98, 49: 1, 50: 1, 75: 0.55, 99: 0.100888, 100: 0.1, 105: 0.1}),
        (1000, {0: 0.02, 49: 1, 50: 1, 525: 0.55, 1000: 0.1}),
        (5000, {0: 0.004, 124: 0.5, 249: 1, 250: 1, 1437: 0.868303, 2625: 0.55, 5000: 0.1}),
        (20, {0: 0.02, 9: 0.2, 19: 0.4}),
        (50, {0: 0.02, 49: 1}),
    ],
)
def test_cosine_warms_up_and_falls_to_a_tenth(max_steps: int, factors: dict[int, float]) -> None:
    got = {step: lr_factor("cosine", step, max_steps) for step in factors}
    assert got == pytest.approx(factors, rel=1e-5)


def test_cosine_never_rises_after_its_warm_up() -> None:
    factors = [lr_factor("cosine", step, 400) for step in range(400)]
    assert factors[:50] == sorted(factors[:50])
    assert factors[49:] == sorted(factors[49:], reverse=True)
    assert all(math.isclose(a - b, 0, abs_tol=0.02 + 1e-9) for a, b in zip(factors, factors[1:], strict=False))


@pytest.mark.parametrize(
    ("warmup_steps", "factors"),
    [
        (0, {0: 1, 500: 0.55, 1000: 0.1}),
        (1, {0: 1, 1: 1, 1000: 0.1}),
        (200, {0: 0.005, 99: 0.5, 199: 1, 200: 1, 600: 0.55, 1000: 0.1, 1001: 0.1}),
        (1000, {0: 0.001, 999: 1, 1000: 1}),
        (2000, {999: 0.5, 1000: 0.5005}),
    ],
)
def test_a_warm_up_of_its_own_length(warmup_steps: int, factors: dict[int, float]) -> None:
    got = {step: lr_factor("cosine", step, 1000, warmup_steps) for step in factors}
    assert got == pytest.approx(factors, rel=1e-5)
    assert lr_factor("constant", 0, 1000, warmup_steps) == 1


def test_a_negative_warm_up_is_refused_and_none_is_allowed() -> None:
    with pytest.raises(UserError, match=r"model\.warmup_steps -1: it must be a whole number"):
        ClassicLM(vocab_size=VOCAB, lr=1e-3, weight_decay=0.0, dropout=0.0, warmup_steps=-1)
    lit = ClassicLM(vocab_size=VOCAB, lr=1e-3, weight_decay=0.0, dropout=0.0, warmup_steps=None)
    assert lit.config.warmup_steps is None


def test_constant_has_no_warm_up_and_no_end() -> None:
    assert [lr_factor("constant", step, 100) for step in (0, 1, 50, 99, 100)] == [1, 1, 1, 1, 1]
