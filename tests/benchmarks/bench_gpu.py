"""On a CUDA GPU: tokens per second and MFU of a small GPT in bf16, eager and compiled, against nanoGPT.

The size is the usual one for Shakespeare on a GPU: 6 x 384, batches of 64 windows of 256 tokens, dropout 0.2.
"""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.bench_training import PLAIN, VOCAB, our_loss
from benchmarks.measuring import Report
from torch import Tensor, nn

from minigpt_pl.models.config import ClassicConfig, ModernConfig
from minigpt_pl.models.gpt import GPT, ClassicGPT, ModernGPT
from minigpt_pl.training.optim import OptimizerConfig, build_optimizer

pytestmark = pytest.mark.bench
SIZES: dict[str, Any] = dict(block_size=256, vocab_size=VOCAB, n_layer=6, n_head=6, n_embd=384, dropout=0.2)
BATCH, ROUNDS, STEPS = 64, 8, 20
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}
"""Dense bf16 products with fp32 sums, from the data sheets."""


def trainer(model: Any, loss_of: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """Runs STEPS whole updates on random tokens: forward and backward in bf16, clipping, AdamW."""
    model.cuda()
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4, weight_decay=0.1, optimizer="adamw"))
    ids = torch.randint(VOCAB, (BATCH, SIZES["block_size"] + 1), device="cuda")
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def steps() -> None:
        for _ in range(STEPS):
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(model, x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    return steps


def modern(n_experts: int) -> ModernGPT:
    return ModernGPT(ModernConfig(**SIZES, rms_norm_eps=1e-6, ffn_mult=8 / 3, n_experts=n_experts, **PLAIN), seed=1)


@pytest.mark.filterwarnings("ignore")  # torch.compile emits many
def test_gpu(report: Report, nanogpt: ModuleType | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")
    torch.set_float32_matmul_precision("high")
    models: dict[str, Callable[[], Any]] = {
        "classic": lambda: ClassicGPT(ClassicConfig(**SIZES), seed=1),
        "modern": lambda: modern(0),
        "MoE": lambda: modern(4),
    }
    losses = dict.fromkeys(models, our_loss)
    if nanogpt is not None:
        models["nanoGPT"] = lambda: nanogpt.GPT(nanogpt.GPTConfig(**SIZES, bias=True))
        losses["nanoGPT"] = lambda model, x, y: model(x, y)[1]
    competitors, flops = {}, {}
    for name, make in models.items():
        for mode in ("eager", "compiled"):
            model = make()
            if mode == "compiled":
                model.compile()
            competitors[f"{name}, {mode}"] = trainer(model, losses[name])
            counted = model if isinstance(model, GPT) else models["classic"]()  # nanoGPT's sizes are the same
            flops[f"{name}, {mode}"] = counted.flops_per_token()
    per_second: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(1 + ROUNDS):
        for name, steps in competitors.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            steps()
            if turn:
                per_second[name].append(STEPS * BATCH * SIZES["block_size"] / (time.perf_counter() - start))
    report.add("training on the GPU, bf16, 6 x 384, 64 x 256 tokens", "tokens/s", per_second)
    device = torch.cuda.get_device_name()
    if peak := next((value for name, value in PEAK_FLOPS.items() if name in device), None):
        mfu = {name: [100 * flops[name] * value / peak for value in values] for name, values in per_second.items()}
        report.add(f"MFU, of {peak:.3g} FLOP/s", "%", mfu)
