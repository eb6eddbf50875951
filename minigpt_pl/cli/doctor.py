"""The command doctor: checks each device with the model and the batches that a run would have; writes no file."""

import copy
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minigpt_pl.cli.app import MiniGPTCLI
from minigpt_pl.cli.errors import canonical_precision, mps_attention_leaks
from minigpt_pl.cli.help import is_help_request, render_help
from minigpt_pl.data.baselines import MAX_BASELINE_CHARACTERS, split_baselines
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.datasets import TrainDataset
from minigpt_pl.models.gpt import GPT, token_cross_entropy
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.quiet import silence_libraries
from minigpt_pl.training.lit_modules import LanguageModel
from minigpt_pl.training.loggers import memory_gib
from minigpt_pl.training.optim import OptimizerConfig, build_optimizer
from minigpt_pl.training.summary import versions

DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16}
LABELS = {True: "ok  ", False: "BAD ", None: "    "}
ABOUT = """Checks this machine with the options of fit. For each device it checks that attention is causal, that
gradients equal those of the CPU and that a step is repeatable. It measures speed, time and memory, and prints which
losses to expect on this text. No file is written. The exit status is 2 if a check fails (BAD)."""
MAX_MPS_TOKENS = 32_768  # above it gradients on MPS have been wrong by orders of magnitude (pytorch issue 177116)
Check = tuple[bool | None, str]  # whether it passed, or None for a measurement; one line of text
Autocast = Callable[[], AbstractContextManager[Any]]


def harmful_versions(versions: dict[str, str], device: str, precision: str) -> Iterator[str]:
    """Known problems of the installed versions; `versions` are by package name."""
    if versions["lightning"] in ("2.6.2", "2.6.3"):
        yield f"lightning {versions['lightning']} on PyPI was malware (GHSA-w37p-236h-pfx3): uninstall it"
    if mps_attention_leaks(versions["torch"], device, precision):
        yield f"torch {versions['torch']} leaks future tokens in {precision} attention on MPS: use 2.13, or 32-true"


def is_causal(model: GPT, ids: Tensor, autocast: Autocast) -> bool:
    """Whether logits of earlier positions stay bit-exact when the last token of ids (B, T) changes.

    With experts only up to rounding, which depends on the other tokens of an expert. In less than fp32 that would hide
    a leak, so a model with experts is checked in fp32.
    """
    changed, has_experts = ids.clone(), any(model.moe_layers())
    changed[:, -1] = (changed[:, -1] + 1) % model.head.out_features
    with torch.no_grad(), nullcontext() if has_experts else autocast():
        before, after = (model(x)[0][:, :-1] for x in (ids, changed))
    tolerance = 64 * torch.finfo(before.dtype).eps * before.abs().max() if has_experts else 0
    return bool((before - after).abs().max() <= tolerance)


def gradients(model: GPT, ids: Tensor) -> Tensor:
    """The gradient of the loss on ids (B, T + 1) as one vector, in fp32 on the CPU."""
    model.zero_grad(set_to_none=True)
    logits, aux_loss = model(ids[:, :-1])
    (token_cross_entropy(logits, ids[:, 1:]).mean() + aux_loss).backward()
    return torch.cat([p.grad.detach().float().cpu().flatten() for p in model.parameters() if p.grad is not None])


def fill_zero_params(model: GPT) -> GPT:
    """A copy in which parameters that are all 0 are random: behind zeros an error would not show."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02, generator=generator)
    return model


def step_seconds(model: GPT, ids: Tensor, autocast: Autocast, config: OptimizerConfig) -> float:
    """Mean seconds of a training step on ids (B, T + 1), over five steps after two that are not timed."""
    optimizer = build_optimizer(model, config)
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(ids.device.type, lambda: None)
    for step in range(7):
        if step == 2:
            synchronize()
            start = time.perf_counter()
        with autocast():
            logits, aux_loss = model(ids[:, :-1])
            loss = token_cross_entropy(logits, ids[:, 1:]).mean() + 0 * aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize()
    return (time.perf_counter() - start) / 5


def run_checks(lm: LanguageModel, data: TextDataModule, device: str, precision: str, trainer: Any) -> Iterator[Check]:
    """The checks and measurements of one device; `trainer` has the Trainer options of the run."""
    problems = list(harmful_versions(versions(), device, precision))
    yield not problems, f"versions: {'; '.join(problems) or 'no known problem'}"
    block_size, batch_size = data.config.block_size, data.config.batch_size
    batch = TrainDataset(data.tokens("train"), block_size, batch_size, data.config.seed)[0]
    cpu_ids = torch.cat([batch.inputs[:, :1], batch.targets], 1)  # (B, T + 1)
    cpu_net, dtype = fill_zero_params(lm.net).eval(), DTYPES[precision]
    net, ids = copy.deepcopy(cpu_net).to(device), cpu_ids.to(device)
    autocast = partial(torch.autocast, device, dtype=dtype, enabled=dtype is not None)
    causal, checked_in = is_causal(net, ids[:, :-1], autocast), "32-true" if any(net.moe_layers()) else precision
    verb = "does not change" if causal else "changes"
    yield causal, f"causality: a later token {verb} earlier logits in {checked_in}"
    first, second = gradients(net, ids), gradients(net, ids)
    if device != "cpu":
        reference = gradients(cpu_net, cpu_ids)
        error = ((first - reference).norm() / reference.norm()).item()
        yield error < 1e-3, f"gradients: relative difference from the CPU {error:.1e}"
    same = torch.equal(first, second)
    yield same or device != "cpu", f"repeatability: the same step twice is {'' if same else 'not '}bit-exact"
    tokens = batch_size * block_size
    if device == "mps" and tokens > MAX_MPS_TOKENS:
        yield False, f"micro-batch: {tokens} tokens; above {MAX_MPS_TOKENS} gradients are wrong: lower data.batch_size"
    seconds = step_seconds(net.train(), ids, autocast, lm.config)
    total = seconds * trainer.max_steps * trainer.accumulate_grad_batches
    duration = f"{total / 60:.1f} min" if total > 60 else f"{total:.0f} s"
    yield None, f"speed: {tokens / seconds:,.0f} tokens/s"
    yield None, f"time: {trainer.max_steps} steps take about {duration}, without evaluations"
    if (used := memory_gib(device)) is not None:
        in_machine = device != "cuda"  # and then not Windows, for which memory_gib has no number
        pages = in_machine and os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        total_bytes = pages if in_machine else torch.cuda.mem_get_info()[1]
        yield None, f"memory: {used:.2f} GiB used at most, of {total_bytes / 2**30:.1f} GiB"


def expected_losses(data: TextDataModule) -> str:
    """Which losses are normal on a text, in one line."""
    start = f"an untrained model has about {math.log(data.vocab_size):.2f} nats/token"
    if data.text_stats.characters > MAX_BASELINE_CHARACTERS:
        return f"{start}; minigpt baselines computes what simple methods reach"
    baselines = split_baselines(data)
    values = ", ".join(f"{name} {baselines[name]['nats_per_char']:.2f}" for name in ("bigram", "5-gram", "xz"))
    return f"{start}; a trained one should be below {values} nats/char"


class Doctor(MiniGPTCLI):
    """`fit` up to the point where training would begin."""

    def fit(self, model: LanguageModel, **kwargs: Any) -> None:
        trainer = self.config_init["fit"].trainer
        precision = canonical_precision(trainer.precision)
        if precision not in DTYPES:
            raise UserError(f"doctor checks {' and '.join(DTYPES)} only", option="trainer.precision", value=precision)
        print(", ".join(f"{name} {versions()[name]}" for name in ("python", "torch", "lightning")), platform.platform())
        available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        devices, passed = [name for name in available if available[name]], True
        for device in devices:
            print(f"\n{device}")
            for result, text in run_checks(model, self.datamodule, device, precision, trainer):
                print(f"  {LABELS[result]}{text}", flush=True)
                passed = passed and result is not False
        print("" if len(devices) > 1 else "\nno CUDA and no MPS on this machine: a run will use the CPU")
        print(f"loss: {expected_losses(self.datamodule)}")
        print("all checks passed" if passed else "some checks failed: see the lines that begin with BAD")
        self.status = 0 if passed else 2


def run(command: str, args: list[str]) -> int:
    """Checks every device, with the options of fit; returns 0 if all checks pass, else 2."""
    silence_libraries()
    if is_help_request(args):
        usage, rest = render_help("fit", args).split("\n", 1)
        print(f"{usage.replace('minigpt fit', f'minigpt {command}')}\n{ABOUT}\n{rest}")
        return 0
    return Doctor("fit", args).status
