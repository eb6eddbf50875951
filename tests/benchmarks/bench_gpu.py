"""On a CUDA GPU: tokens per second and MFU of a small GPT in bf16, eager and compiled, against nanoGPT.

Shakespeare's usual size on a GPU: 6 x 384, windows of 256, 64 of them, dropout 0.2.
"""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.bench_training import VOCAB, our_loss
from benchmarks.measuring import Report
from torch import Tensor, nn

from minigpt_pl.models.gpt import GPT, ClassicGPT, ModernGPT
from minigpt_pl.training.optim import build_optimizer

pytestmark = pytest.mark.bench
SIZES = {"block_size": 256, "vocab_size": VOCAB, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2}
BATCH, ROUNDS, STEPS = 64, 8, 20
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}
"""Dense bf16 products with fp32 sums, by the makers' data sheets."""


def trainer(model: nn.Module, loss_of: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """Some whole updates on random tokens: forward and backward in bf16, clipping, AdamW."""
    model.cuda()
    optimizer = build_optimizer(model, 1e-4, 0.1)
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
    experts: dict[str, Any] = {"n_experts": n_experts, "moe_top_k": 1, "moe_gate": "softmax_all"}
    plain: dict[str, Any] = {"tie_embeddings": True, "zero_init": False, "conv_kernel_size": 0}
    return ModernGPT(**SIZES, rope_theta=1e4, rms_norm_eps=1e-6, ffn_mult=8 / 3, **experts, **plain, seed=1)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # torch's compiler has many
def test_gpu(report: Report, nanogpt: ModuleType | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")
    torch.set_float32_matmul_precision("high")
    makers: dict[str, Callable[[], Any]] = {
        "classic": lambda: ClassicGPT(**SIZES, seed=1),  # type: ignore[arg-type]
        "modern": lambda: modern(0),
        "MoE": lambda: modern(4),
    }
    losses = dict.fromkeys(makers, our_loss)
    if nanogpt is not None:
        makers["nanoGPT"] = lambda: nanogpt.GPT(nanogpt.GPTConfig(**SIZES, bias=True))
        losses["nanoGPT"] = lambda model, x, y: model(x, y)[1]
    rivals, flops = {}, {}
    for name, make in makers.items():
        for way in ("eager", "compiled"):
            model = make()
            if way == "compiled":
                model.compile()
            rivals[f"{name}, {way}"] = trainer(model, losses[name])
            counted = model if isinstance(model, GPT) else makers["classic"]()  # nanoGPT's sizes are the same
            flops[f"{name}, {way}"] = counted.flops_per_token()
    per_second: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(1 + ROUNDS):
        for name, steps in rivals.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            steps()
            if turn:
                per_second[name].append(STEPS * BATCH * SIZES["block_size"] / (time.perf_counter() - began))
    report.add("training on the GPU, bf16, 6 x 384, 64 x 256 tokens", "tokens/s", per_second)
    device = torch.cuda.get_device_name()
    if peak := next((value for part, value in PEAK_FLOPS.items() if part in device), None):
        mfu = {name: [100 * flops[name] * value / peak for value in values] for name, values in per_second.items()}
        report.add(f"MFU, of {peak:.3g} FLOP/s", "%", mfu)
