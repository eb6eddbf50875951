"""The overhead of Lightning and of this package over a bare training loop."""

import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from benchmarks.measuring import Report
from torch import nn

from minigpt_pl.__main__ import main
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.datasets import StepSampler, TrainDataset
from minigpt_pl.models.gpt import token_cross_entropy
from minigpt_pl.training.fit import FitRunner
from minigpt_pl.training.lit_modules import ModernLM
from minigpt_pl.training.optim import build_optimizer, lr_factor

pytestmark = pytest.mark.bench
WARMUP = 5


def default_modules(**sizes: Any) -> tuple[ModernLM, TextDataModule]:
    torch.manual_seed(1337)
    data = TextDataModule(
        path="data/input.txt", block_size=sizes.get("block_size", 256), batch_size=sizes.pop("batch_size", 8),
        eval_every=10**9, seed=1337,
    )  # fmt: skip
    options = {"lr": 6e-3, "dropout": 0.2, "weight_decay": 0.1} | sizes
    return ModernLM(vocab_size=data.vocab_size, **options), data


def train_loader(data: TextDataModule, steps: int) -> torch.utils.data.DataLoader[Any]:
    batches = TrainDataset(data.tokens("train"), data.config.block_size, data.config.batch_size, seed=1337)
    return torch.utils.data.DataLoader(batches, batch_size=None, sampler=StepSampler(steps, lambda: 0))


def bare_loop(steps: int, **sizes: Any) -> float:
    """Seconds per step of the same batches, model, clipping, schedule and optimizer, and nothing else."""
    model, data = default_modules(**sizes)
    optimizer = build_optimizer(model.net, model.config)
    for i, (x, y) in enumerate(train_loader(data, steps)):
        if i == WARMUP:
            start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * lr_factor("cosine", i, steps)
        token_cross_entropy(model.net(x)[0], y).mean().backward()
        nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - start) / (steps - WARMUP)


class StepTimer(pl.Callback):
    """Wall-clock seconds per step: with logging, progress bar and saves, without the evaluation at the end."""

    def __init__(self) -> None:
        self.start = self.end = 0.0
        self.steps = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.end = time.perf_counter()
        if batch_idx == WARMUP:
            self.start = self.end
        self.steps = batch_idx - WARMUP

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / self.steps


class PlainModule(pl.LightningModule):
    """The model under a Trainer without logger, progress bar and callbacks."""

    def __init__(self, model: ModernLM):
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return token_cross_entropy(self.model.net(batch[0])[0], batch[1]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model.net, self.model.config)


def plain_trainer(steps: int, **sizes: int) -> float:
    model, data = default_modules(**sizes)
    timer = StepTimer()
    trainer = pl.Trainer(
        max_steps=steps, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[timer], gradient_clip_val=1.0, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(PlainModule(model), train_loader(data, steps))
    return timer.seconds


def full_fit(steps: int, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> float:
    """Seconds per step of `fit` with progress bar, W&B, metrics.csv and checkpoints."""
    timer, callbacks = StepTimer(), FitRunner.callbacks
    args = ["--run_dir", str(run_dir), "--trainer.max_steps", str(steps), "--data.eval_every", str(10**6)]
    with monkeypatch.context() as patch:
        patch.setattr(FitRunner, "callbacks", lambda self, others: [*callbacks(self, others), timer])
        assert main(["fit", *options, *args, "--samples", "null", "--trainer.accelerator", "cpu"]) == 0
    return timer.seconds


def test_default_configuration(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: dict[str, list[float]] = {"fit, everything on": [], "bare loop": []}
    for turn in range(8):
        seconds["bare loop"].append(bare_loop(80))
        seconds["fit, everything on"].append(full_fit(80, tmp_path / str(turn), monkeypatch))
    report.add("a step of the default configuration", "s", seconds)


def test_recipe_for_a_laptop(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = yaml.safe_load(Path("configs/recipes/laptop.yaml").read_text())
    sizes = {**recipe["model"]["init_args"], "batch_size": recipe["data"]["batch_size"]}
    seconds: dict[str, list[float]] = {"fit, everything on": [], "bare loop": []}
    for turn in range(8):
        seconds["bare loop"].append(bare_loop(80, **sizes))
        run_dir = tmp_path / str(turn)
        seconds["fit, everything on"].append(full_fit(80, run_dir, monkeypatch, "-c", "recipes/laptop"))
    report.add("a step of the recipe for a laptop", "s", seconds)


def test_tiny_model(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16, "batch_size": 4}
    args = [f"--{'data' if name == 'batch_size' else 'model'}.{name}={value}" for name, value in tiny.items()]
    seconds: dict[str, list[float]] = {"fit, everything on": [], "Trainer, all off": []}
    for turn in range(8):
        seconds["Trainer, all off"].append(1e6 * plain_trainer(600, **tiny))
        seconds["fit, everything on"].append(1e6 * full_fit(600, tmp_path / str(turn), monkeypatch, *args))
    added = sorted(round(ours - plain) for ours, plain in zip(*seconds.values(), strict=True))
    note = f"added: {statistics.median(added):.0f} us [{added[0]} ... {added[-1]}]"
    report.add("a step of a tiny model", "us", seconds, note)
