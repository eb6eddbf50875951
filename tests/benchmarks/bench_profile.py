"""What a training step consists of: the share of matrix products, and their rate beside the machine's own."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from benchmarks.bench_training import our_loss, stepper
from benchmarks.measuring import Report
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from minigpt_pl.training.lit_modules import ModernLM

pytestmark = pytest.mark.bench
ROUNDS = 8
STEPS = 5
SIDE = 2048
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", ATTENTION, f"{ATTENTION}_backward"}


def step_of(*files: str) -> Callable[[], None]:
    """An update of the model of the config files, later ones winning, on a batch of their size."""
    model, batch_size = {"vocab_size": 65, "block_size": 256}, 0
    for file in files:
        config = yaml.safe_load(Path("configs", file).read_text())
        model |= config["model"]["init_args"]
        batch_size = config["data"].get("batch_size", batch_size)
    lit = ModernLM(**model)
    return stepper(lit.net, our_loss, batch_size, lit.config.block_size, lit.config)


def gflops_of_a_large_product() -> float:
    a, b = torch.randn(2, SIDE, SIDE).unbind()
    start = time.perf_counter()
    a @ b
    return 2 * SIDE**3 / (time.perf_counter() - start) / 1e9


@pytest.mark.parametrize("file", ["default.yaml", "recipes/laptop.yaml"])
def test_products_of_a_step(report: Report, file: str) -> None:
    step = step_of("default.yaml", file)
    with FlopCounterMode(display=False) as counter:
        step()
    gflop = STEPS * counter.get_total_flops() / 1e9
    rates: dict[str, list[float]] = {"products in the step": [], f"one product of {SIDE}^3": []}
    shares = []
    for turn in range(2 + ROUNDS):
        rate = gflops_of_a_large_product()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(STEPS):
                step()
        parts = {part.key: part.self_cpu_time_total / 1e6 for part in profiled.key_averages()}
        seconds = sum(parts.get(name, 0.0) for name in PRODUCTS)
        if turn >= 2:
            rates["products in the step"].append(gflop / seconds)
            rates[f"one product of {SIDE}^3"].append(rate)
            shares.append(seconds / sum(parts.values()))
    note = f"products are {min(shares):.0%} to {max(shares):.0%} of a step of {gflop / STEPS:.2f} GFLOP"
    report.add(f"matrix products in a training step, {file}", "GFLOP/s", rates, note)
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=50))
