"""That a step runs on Apple's GPU, shown without one: kernels by torch's own table, no float64, no wait for the device.

Tensors here say that they are on another device and are computed on the CPU, so that torch and the package choose as
they do off the CPU. What a kernel that torch composes of others calls in turn is not seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from support.tiny_models import EXPERTS, KINDS, VOCAB, lively, redraw, some_ids
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.models.gpt import GPT
from minigpt_pl.training.lit_modules import ClassicLM, LanguageModel, ModernLM
from minigpt_pl.training.optim import build_optimizer

THERE = torch.device("meta")  # of the devices that are no CPU, the one that every build of torch knows

# The table: torch ships the file from which its kernels are registered.


@cache
def kernels() -> tuple[Any, dict[str, Any]]:
    """The kernels by device, and the functions by name."""
    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    return parsed.backend_indices, {str(f.func.name): f for f in parsed.native_functions}


def runs_on_mps(op: str) -> bool:
    """Whether an aten op such as `add.Tensor` has an MPS kernel, or one composed of other ops."""
    by_device, by_name = kernels()
    function = by_name[op]
    if function.has_composite_kernel or by_device[DispatchKey.MPS].has_kernel(function):
        return True
    structured = function.structured_delegate
    return structured is not None and by_device[DispatchKey.MPS].has_kernel(by_name[str(structured)])


# The stand-in for a device.


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device; `held` has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type, held: Tensor) -> "Elsewhere":
        with torch.inference_mode(False):  # there, a view of a parameter could not be wrapped
            t: Any = torch.Tensor._make_wrapper_subclass(
                cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=THERE
            )
        t.held = held
        return t

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{op} outside of a trace")

    def tolist(self) -> list:  # torch refuses it to tensors that are not its own
        return self.cpu().tolist()


class Trace(TorchDispatchMode):
    """Computes what is elsewhere on the CPU, and notes ops, dtypes and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.wide: set[str] = set()
        """Ops that have read or written float64."""
        self.waits: list[str] = []
        """Ops for which the host had to wait until the device came that far, in order."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if op._can_decompose():  # without gradients, an op that is made of others comes here whole
            with self:
                return op.decompose(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        ours = {id(leaf.held): leaf for leaf in given if isinstance(leaf, Elsewhere)}
        to = kwargs.get("device")
        stays = bool(ours) if to is None else torch.device(to) == THERE
        if op is torch.ops.aten.copy_.default:
            stays = isinstance(args[0], Elsewhere)
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
        result = op(*args, **kwargs)
        if not ours and not stays:
            return result
        self._note(op, tree_leaves((args, kwargs)), tree_leaves(result), bool(ours) and not stays)
        if not stays:
            return result

        def wrap(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return ours[id(leaf)] if id(leaf) in ours else Elsewhere(leaf)
            return leaf

        return tree_map(wrap, result)

    def _note(self, op: Any, given: list[Any], got: list[Any], comes_back: bool) -> None:
        name = op._schema.name.removeprefix("aten::") + (
            f".{op._overloadname}" if op._overloadname != "default" else ""
        )
        self.ops.add(name)
        if any(isinstance(leaf, Tensor) and leaf.dtype in (torch.float64, torch.complex128) for leaf in [*given, *got]):
            self.wide.add(name)
        by_content = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(op.tags)
        if name.startswith("index"):  # by numbers it needs nobody's answer, by a mask it does
            by_content = {leaf for leaf in given if isinstance(leaf, Tensor) and leaf.dtype == torch.bool}
        if comes_back or by_content:
            self.waits.append(name)


class MakeElsewhere(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)`, which for this device would forget the numbers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") == THERE:
            return Elsewhere(function(*args, **{**kwargs, "device": "cpu"}))
        return function(*args, **kwargs)


def move(module: nn.Module) -> None:
    """`module.to(device)`: tied parameters stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = moved.setdefault(id(parameter), nn.Parameter(Elsewhere(parameter.detach())))
                part._parameters[name] = new
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Elsewhere(buffer)


@contextmanager
def tracing() -> Iterator[Trace]:
    with MakeElsewhere(), Trace() as trace:
        yield trace


@pytest.fixture(autouse=True)
def _fused_as_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    room = import_module("torch.optim.optimizer")
    supported = room._get_fused_kernels_supported_devices()
    assert "mps" in supported
    monkeypatch.setattr(room, "_get_fused_kernels_supported_devices", lambda: [*supported, THERE.type])


# What is traced.


def language_model(kind: str, dropout: float) -> LanguageModel:
    choices: dict[str, Any] = {
        "vocab_size": VOCAB,
        "lr": 1e-3,
        "dropout": dropout,
        "weight_decay": 0.1,
        "n_layer": 2,
        "n_embd": 32,
        "block_size": 16,
    }
    if kind != "recipes":
        choices |= {"optimizer": "adamw"}
    model = ClassicLM(**choices) if kind == "classic" else ModernLM(**choices, **EXPERTS[kind])
    redraw(model.net)
    return model


def place(model: LanguageModel) -> None:
    """As Lightning does when a run begins."""
    move(model)
    model.running_means.sums = Elsewhere(model.running_means.sums)


def training_step(model: LanguageModel, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    loss = model.training_step(batch, 0)
    loss.backward()
    model.configure_gradient_clipping(optimizer, 1.0, "norm")
    optimizer.step()


def read_all(trace: Trace) -> None:
    """What the table says of a trace."""
    assert trace.ops, "nothing was traced"
    assert {op for op in trace.ops if not runs_on_mps(op)} == set()
    assert trace.wide == set()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step(kind: str, dropout: float) -> None:
    with tracing() as trace:
        model, ids = language_model(kind, dropout), some_ids(4, 17)
        place(model)
        optimizer = build_optimizer(model.net, model.config)
        for _ in range(2):  # the first one makes the optimizer's state
            trace.waits.clear()
            training_step(model, optimizer, (Elsewhere(ids[:, :-1]), Elsewhere(ids[:, 1:])))
            experts = len(list(model.net.moe_layers()))
            assert len(trace.waits) <= experts, trace.waits
        assert 0 < model.running_means.sums.tolist()[0] < 20
        assert model.is_finite()
    read_all(trace)


@pytest.mark.parametrize(("streams", "use_cache"), [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_step(kind: str, streams: int, use_cache: bool) -> None:
    model, steps = lively(kind, block_size=6), 8  # past the end of the window
    experts = len(list(model.moe_layers()))
    sampling = SamplingConfig(max_new_tokens=steps, temperature=0.9, top_k=7, top_p=0.9, num_samples=streams)
    expected = list(generate(model, [1, 2, 3], sampling, use_cache))
    with tracing() as trace:
        move(model)
        for greedy in (True, False):
            sampling.temperature = 0.0 if greedy else 0.9
            texts = generate(model, [1, 2, 3], sampling, use_cache)
            got = [next(texts)]
            for _ in range(steps - 1):
                trace.waits.clear()
                got.append(next(texts))
                assert len(trace.waits) <= 1 + experts, trace.waits  # the token itself has to come over
        assert got == expected
    read_all(trace)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_an_evaluation_step(kind: str) -> None:
    with tracing() as trace:
        model, ids = language_model(kind, 0.2).eval(), some_ids(4, 17)
        move(model)
        nats = model.sequence_nll(Elsewhere(ids[:, :-1]), Elsewhere(ids[:, 1:]))
        assert len(trace.waits) <= len(list(model.net.moe_layers()))
        assert nats.cpu().isfinite().all()
    read_all(trace)


def test_kernels_that_torch_uses_on_mps_only() -> None:
    """Choices that it makes in C++ by the device's name: attention and the norm without gradients, dropout."""
    for op in (
        "_scaled_dot_product_attention_math_for_mps",
        "_fused_rms_norm",
        "native_dropout",
        "native_dropout_backward",
    ):
        assert runs_on_mps(op), op


# Controls: that the trace sees what it is there for.


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float16),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.sum() > 0),
        lambda x: torch.zeros(4).copy_(x),
        lambda x: [1, 2, 3][x.argmax() * 0],
    ],
)
def test_waits_are_seen(waits: Callable[[Tensor], object]) -> None:
    with tracing() as trace:
        waits(Elsewhere(torch.arange(4.0)))
    assert len(trace.waits) == 1


def test_missing_kernels_and_float64_are_seen_and_harmless_ops_are_not() -> None:
    with tracing() as trace:
        x = Elsewhere(torch.rand(3, 3))
        y = (x @ x.T + torch.zeros(3, device=THERE)).softmax(-1)[torch.tensor([0, 1], device=THERE)]
        y.add_(1).relu().sum()
        assert (trace.wide, trace.waits) == (set(), [])
        assert all(map(runs_on_mps, trace.ops))
        torch.linalg.eigh(x @ x.T)
        x.double()
    assert [op for op in trace.ops if not runs_on_mps(op)] == ["_linalg_eigh"]
    assert trace.wide == {"_to_copy"}


def test_the_stand_in_computes_what_the_cpu_computes() -> None:
    def losses(model: LanguageModel, wrap: Callable[[Tensor], Tensor]) -> list[float]:
        optimizer, ids, found = build_optimizer(model.net, model.config), some_ids(4, 17), []
        for _ in range(3):
            training_step(model, optimizer, (wrap(ids[:, :-1]), wrap(ids[:, 1:])))
            found.append(model.running_means.sums.tolist()[0])
        return found

    expected = losses(language_model("mixtral", 0.0), lambda x: x)
    with tracing():
        model = language_model("mixtral", 0.0)
        place(model)
        assert losses(model, Elsewhere) == pytest.approx(expected, rel=1e-4)
    assert isinstance(model.net, GPT)
