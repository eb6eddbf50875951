"""What Lightning and everything of ours cost over a bare loop."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from benchmarks.measuring import Report
from torch import nn

from minigpt_pl.__main__ import main
from minigpt_pl.data import FromStep, TextDataModule, TrainBatches
from minigpt_pl.models import nll
from minigpt_pl.modules import ModernLM
from minigpt_pl.optim import lr_factor

pytestmark = pytest.mark.bench
WARMUP = 5


def default_parts(**sizes: int) -> tuple[ModernLM, TextDataModule]:
    torch.manual_seed(1337)
    data = TextDataModule("data/input.txt", sizes.get("block_size", 128), sizes.pop("batch_size", 16), 10**9, 1337)
    return ModernLM(data.vocab_size, 2e-3, 0.1, 0.1, **sizes), data


def bare_loop(steps: int, **sizes: int) -> float:
    """Seconds a step: the same batches, model, clipping, schedule and optimizer, and nothing else."""
    model, data = default_parts(**sizes)
    optimizer = model.configure_optimizers()
    batches = TrainBatches(data.tokens("train"), data.block_size, data.batch_size, 1, 1337, 0, 1)
    for i, (x, y) in enumerate(torch.utils.data.DataLoader(batches, batch_size=None, sampler=FromStep(0, steps))):
        if i == WARMUP:
            began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * lr_factor("cosine", i, steps)
        nll(model.net(x)[0], y).mean().backward()
        nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) / (steps - WARMUP)


class Watch(pl.Callback):
    """Seconds a step, as a whole run goes by: logging, bar and saves included, checks not."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARMUP:
            self.began = time.perf_counter()
        self.seconds = time.perf_counter() - self.began


class Plain(pl.LightningModule):
    """The model under a Trainer with logger, bar and callbacks off."""

    def __init__(self, model: ModernLM):
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nll(self.model.net(batch[0])[0], batch[1]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.model.configure_optimizers()


def plain_trainer(steps: int, **sizes: int) -> float:
    model, data = default_parts(**sizes)
    batches = TrainBatches(data.tokens("train"), data.block_size, data.batch_size, 1, 1337, 0, 1)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=FromStep(0, steps))
    watch = Watch()
    trainer = pl.Trainer(
        max_steps=steps, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[watch], gradient_clip_val=1.0, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Plain(model), loader)
    return watch.seconds / (steps - WARMUP - 1)


def everything(steps: int, run_dir: Path, *options: str) -> float:
    """Seconds a step of `fit` with W&B, metrics.csv, checkpoints; the check at its end is not counted."""
    words = ["fit", "--run_dir", str(run_dir), "--trainer.max_steps", str(steps), "--data.eval_every", str(10**6)]
    assert main([*words, "--samples", "null", "--trainer.accelerator", "cpu", *options]) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    return summary["tokens_seen"] / steps / summary["tokens_per_s"]


def test_default_configuration(report: Report, tmp_path: Path) -> None:
    seconds: dict[str, list[float]] = {"bare loop": [], "fit, everything on": []}
    for turn in range(6):
        seconds["bare loop"].append(bare_loop(80))
        seconds["fit, everything on"].append(everything(80, tmp_path / str(turn)))
    report.add("a step of the default configuration", "s", seconds)


def test_tiny_model(report: Report, tmp_path: Path) -> None:
    tiny = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16, "batch_size": 4}
    words = [f"--{'data' if name == 'batch_size' else 'model'}.{name}={value}" for name, value in tiny.items()]
    seconds: dict[str, list[float]] = {"Trainer, all off": [], "fit, everything on": []}
    for turn in range(6):
        seconds["Trainer, all off"].append(1e6 * plain_trainer(600, **tiny))
        seconds["fit, everything on"].append(1e6 * everything(600, tmp_path / str(turn), *words))
    added = [b - a for a, b in zip(*seconds.values(), strict=True)]
    report.add("a step of a tiny model", "us", seconds, f"added: {sorted(round(value) for value in added)} us")
