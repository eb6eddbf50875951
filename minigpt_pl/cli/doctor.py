"""Checks the user's own device at the shape that a run would have, and says what it found, a verdict a line.

The same model is built, trained for a few steps and thrown away; nothing is written.
"""

import copy
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from minigpt_pl.cli.app import MiniGPTCLI
from minigpt_pl.cli.errors import canonical_precision, mps_attention_leaks
from minigpt_pl.cli.help import is_help_request, render_help, silence_libraries
from minigpt_pl.data.baselines import MAX_BASELINE_CHARACTERS, compute_baselines
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.datasets import TrainDataset
from minigpt_pl.models.gpt import GPT, token_cross_entropy
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.lit_modules import LanguageModel
from minigpt_pl.training.loggers import memory_gib
from minigpt_pl.training.optim import OptimizerName, build_optimizer
from minigpt_pl.training.summary import versions

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}
GOOD, BAD, TOLD = "ok  ", "BAD ", "    "
ABOUT = """Would fit run well here, with these settings? Says of each device whether attention is causal, gradients
are those of the CPU and a step repeats itself; speed, time and memory; and what losses are normal on this text.
Nothing is written. Exit status 2 if anything is BAD."""
MOST_MPS_TOKENS = 32_768  # above it gradients on MPS have been wrong by orders of magnitude (pytorch issue 177116)


def harmful_versions(versions: dict[str, str], device: str, precision: str) -> Iterator[str]:
    """What is known to go wrong with installed versions; `versions` are by package name."""
    if versions["lightning"] in ("2.6.2", "2.6.3"):
        yield f"lightning {versions['lightning']} on the package index was malware (GHSA-w37p-236h-pfx3): remove it"
    torch_version = tuple(int(part) for part in versions["torch"].split("+")[0].split(".")[:2])
    if mps_attention_leaks(versions["torch"], device, precision):
        yield f"torch {versions['torch']} leaks the future in {precision} attention on MPS: take 2.13, or 32-true"
    if device == "mps" and torch_version < (2, 11):
        yield f"torch {versions['torch']} has silent errors in attention on MPS: take a newer one"


def is_causal(model: GPT, ids: Tensor, precise: Callable[[], Any]) -> bool:
    """Whether a change of the last token leaves the logits of all earlier positions as they are, to the bit.

    But for rounding where there are experts: with which other tokens one is shared decides how its products are
    rounded. In less than fp32 that would hide a leak, so such a model is examined in fp32.
    """
    other, has_experts = ids.clone(), any(model.moe_layers())
    other[:, -1] = (other[:, -1] + 1) % model.head.out_features
    with torch.no_grad(), nullcontext() if has_experts else precise():
        before, after = (model(x)[0][:, :-1] for x in (ids, other))
    rounding = 64 * torch.finfo(before.dtype).eps * before.abs().max() if has_experts else 0
    return bool((before - after).abs().max() <= rounding)


def gradients(model: GPT, ids: Tensor) -> Tensor:
    """The gradient of the loss on ids, all in one, in fp32 on the CPU."""
    model.zero_grad(set_to_none=True)
    logits, aux = model(ids[:, :-1])
    (token_cross_entropy(logits, ids[:, 1:]).mean() + aux).backward()
    return torch.cat([p.grad.detach().float().cpu().flatten() for p in model.parameters() if p.grad is not None])


def awake(model: GPT) -> GPT:
    """A copy without parameters that are all 0: behind those nothing could be seen to be wrong."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, 0.02, generator=generator)
    return model


def synchronise(device: str) -> None:
    """Waits until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def speed(model: GPT, ids: Tensor, precise: Callable[[], Any], rule: OptimizerName, steps: int) -> float:
    """Seconds of a training step."""
    optimizer = build_optimizer(model, 1e-4, 0.1, rule)
    device = ids.device.type
    for step in range(steps + 2):
        if step == 2:
            synchronise(device)
            began = time.perf_counter()
        with precise():
            logits, aux = model(ids[:, :-1])
            loss = token_cross_entropy(logits, ids[:, 1:]).mean() + 0 * aux
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronise(device)
    return (time.perf_counter() - began) / steps


def memory(device: str) -> str | None:
    """Memory in use and at hand on the device, in words; None where nobody knows."""
    if (used := memory_gib(device)) is None:
        return None
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return f"{used:.2f} GiB used at most, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if device == "mps":
        return f"{used:.2f} GiB used, {torch.mps.recommended_max_memory() / 2**30:.1f} GiB recommended at most"
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{used:.2f} GiB used at most by this process, {there / 2**30:.1f} GiB in the machine"


def examine(model: LanguageModel, data: TextDataModule, device: str, precision: str, trainer: Any) -> Iterator[str]:
    """The verdicts on one device, each a line; `trainer` has the settings of the run."""
    batches = TrainDataset(data.tokens("train"), data.block_size, data.batch_size, 1, data.seed, 0, 1)
    ids = torch.cat([batches[0].inputs[:, :1], batches[0].targets], 1)  # (B, T + 1)
    net = awake(model.net)
    here, ids_here = copy.deepcopy(net).to(device), ids.to(device)
    kind = PRECISIONS[precision]

    def precise() -> Any:
        return torch.autocast(device, kind, enabled=kind is not None)

    here.eval()
    causal, examined = is_causal(here, ids_here[:, :-1], precise), "32-true" if any(here.moe_layers()) else precision
    says = "does not change" if causal else "CHANGES"
    yield f"{GOOD if causal else BAD}causality: a later token {says} earlier logits in {examined}"
    if device != "cpu":
        reference = gradients(net.eval(), ids)
        error = ((gradients(here, ids_here) - reference).norm() / reference.norm()).item()
        yield f"{GOOD if error < 1e-3 else BAD}gradients: {device} differs from the CPU by {error:.1e} of their norm"
    first, second = gradients(here, ids_here), gradients(here, ids_here)
    same = torch.equal(first, second)
    expected = same or device != "cpu"
    yield f"{GOOD if expected else BAD}repeatability: the same step twice is {'bit-equal' if same else 'not bit-equal'}"
    tokens = data.batch_size * data.block_size
    if device == "mps" and tokens > MOST_MPS_TOKENS:
        yield f"{BAD}micro-batch: {tokens} tokens; gradients go wrong above {MOST_MPS_TOKENS}: lower data.batch_size"
    here.train()
    seconds = speed(here, ids_here, precise, model.optimizer_name, steps=5)
    whole = seconds * trainer.max_steps * trainer.accumulate_grad_batches
    said = f"{whole / 60:.1f} min" if whole > 60 else f"{whole:.0f} s"
    yield f"{TOLD}speed: {tokens / seconds:,.0f} tokens/s"
    yield f"{TOLD}time: {trainer.max_steps} steps will take about {said}, checks aside"
    if used := memory(device):
        yield f"{TOLD}memory: {used}"


def expected_losses(data: TextDataModule) -> str:
    """What losses are normal on a text, in a line."""
    said = f"a fresh model's loss is near {math.log(data.vocab_size):.2f} nats/token"
    if data.text_info.characters > MAX_BASELINE_CHARACTERS:
        return f"{said}; minigpt baselines says what simple methods reach"
    found = compute_baselines(str(data.resolve_path()), data.train_frac, data.test_frac)
    reached = ", ".join(f"{name} {found[name]['nats_per_char']:.2f}" for name in ("bigram", "5-gram", "xz"))
    return f"{said}; a trained one's should fall below {reached} nats/char"


class Doctor(MiniGPTCLI):
    """`fit` up to the point where training would begin."""

    def fit(self, model: LanguageModel, **kwargs: Any) -> None:
        trainer = self.config_init["fit"].trainer
        precision = canonical_precision(trainer.precision)
        if precision not in PRECISIONS:
            raise UserError(f"--trainer.precision {precision}: the doctor knows {', '.join(PRECISIONS)}")
        devices = ["cpu"]
        devices += ["cuda"] if torch.cuda.is_available() else []
        devices += ["mps"] if torch.backends.mps.is_available() else []
        installed, bad = versions(), 0
        named = ", ".join(f"{name} {installed[name]}" for name in ("python", "torch", "lightning"))
        print(f"{named}, {platform.platform()}")
        for device in devices:
            print(f"\n{device}")
            harms = [f"{BAD}versions: {harm}" for harm in harmful_versions(installed, device, precision)]
            verdicts = harms or [f"{GOOD}versions: none that is known to do harm"]
            for verdict in chain(verdicts, examine(model, self.datamodule, device, precision, trainer)):
                print(f"  {verdict}", flush=True)
                bad += verdict.startswith(BAD)
        print()
        if devices == ["cpu"]:
            print("no MPS and no CUDA here: a run will use the CPU")
        print(f"loss: {expected_losses(self.datamodule)}")
        print("not all is well: see the lines that begin with BAD" if bad else "all is well")
        self.status = 2 if bad else 0


def run(command: str, options: list[str]) -> int:
    """Examines the CPU, and MPS or CUDA where there is one; takes the options of fit. 0 if all is well, else 2."""
    silence_libraries()
    if is_help_request(options):
        usage, rest = render_help("fit", options).split("\n", 1)
        print(f"{usage.replace('minigpt fit', f'minigpt {command}')}\n{ABOUT}\n{rest}")
        return 0
    return Doctor("fit", options).status
