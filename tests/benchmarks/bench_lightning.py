"""What Lightning and everything of ours cost over a bare loop."""

import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from benchmarks.measuring import Report
from torch import nn

from minigpt_pl.__main__ import main
from minigpt_pl.data.datamodule import ResumableSampler, TextDataModule, TrainDataset
from minigpt_pl.models.gpt import token_cross_entropy
from minigpt_pl.training.fit import FitRunner
from minigpt_pl.training.lit_modules import ModernLM
from minigpt_pl.training.optim import lr_factor

pytestmark = pytest.mark.bench
WARMUP = 5


def default_parts(**sizes: int) -> tuple[ModernLM, TextDataModule]:
    torch.manual_seed(1337)
    data = TextDataModule("data/input.txt", sizes.get("block_size", 256), sizes.pop("batch_size", 8), 10**9, 1337)
    return ModernLM(data.vocab_size, 6e-3, 0.2, 0.1, **sizes), data


def bare_loop(steps: int, **sizes: int) -> float:
    """Seconds a step: the same batches, model, clipping, schedule and optimizer, and nothing else."""
    model, data = default_parts(**sizes)
    optimizer = model.configure_optimizers()
    batches = TrainDataset(data.tokens("train"), data.block_size, data.batch_size, 1, 1337, 0, 1)
    for i, (x, y) in enumerate(
        torch.utils.data.DataLoader(batches, batch_size=None, sampler=ResumableSampler(0, steps))
    ):
        if i == WARMUP:
            began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * lr_factor("cosine", i, steps)
        token_cross_entropy(model.net(x)[0], y).mean().backward()
        nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) / (steps - WARMUP)


class Watch(pl.Callback):
    """Seconds a step, by the clock on the wall: logging, bar and saves included, the check at the end not."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0
        self.steps = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.ended = time.perf_counter()
        if batch_idx == WARMUP:
            self.began = self.ended
        self.steps = batch_idx - WARMUP

    @property
    def seconds(self) -> float:
        return (self.ended - self.began) / self.steps


class Plain(pl.LightningModule):
    """The model under a Trainer with logger, bar and callbacks off."""

    def __init__(self, model: ModernLM):
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return token_cross_entropy(self.model.net(batch[0])[0], batch[1]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.model.configure_optimizers()


def plain_trainer(steps: int, **sizes: int) -> float:
    model, data = default_parts(**sizes)
    batches = TrainDataset(data.tokens("train"), data.block_size, data.batch_size, 1, 1337, 0, 1)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=ResumableSampler(0, steps))
    watch = Watch()
    trainer = pl.Trainer(
        max_steps=steps, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[watch], gradient_clip_val=1.0, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Plain(model), loader)
    return watch.seconds


def everything(steps: int, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> float:
    """Seconds a step of `fit` with bar, W&B, metrics.csv and checkpoints."""
    watch, ours = Watch(), FitRunner.callbacks
    words = ["fit", "--run_dir", str(run_dir), "--trainer.max_steps", str(steps), "--data.eval_every", str(10**6)]
    with monkeypatch.context() as patch:
        patch.setattr(FitRunner, "callbacks", lambda training: [*ours(training), watch])
        assert main([*words, "--samples", "null", "--trainer.accelerator", "cpu", *options]) == 0
    return watch.seconds


def test_default_configuration(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: dict[str, list[float]] = {"fit, everything on": [], "bare loop": []}
    for turn in range(8):
        seconds["bare loop"].append(bare_loop(80))
        seconds["fit, everything on"].append(everything(80, tmp_path / str(turn), monkeypatch))
    report.add("a step of the default configuration", "s", seconds)


def test_tiny_model(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16, "batch_size": 4}
    words = [f"--{'data' if name == 'batch_size' else 'model'}.{name}={value}" for name, value in tiny.items()]
    seconds: dict[str, list[float]] = {"fit, everything on": [], "Trainer, all off": []}
    for turn in range(8):
        seconds["Trainer, all off"].append(1e6 * plain_trainer(600, **tiny))
        seconds["fit, everything on"].append(1e6 * everything(600, tmp_path / str(turn), monkeypatch, *words))
    added = sorted(round(ours - plain) for ours, plain in zip(*seconds.values(), strict=True))
    note = f"added: {statistics.median(added):.0f} us [{added[0]} ... {added[-1]}]"
    report.add("a step of a tiny model", "us", seconds, note)
