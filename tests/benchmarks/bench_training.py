"""A training step: ours against the reference model, nanoGPT and transformers, at the reference report's sizes."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.measuring import Report, interleaved
from benchmarks.reference_model import ReferenceModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from minigpt_pl.models.config import ClassicConfig, ModernConfig
from minigpt_pl.models.gpt import ClassicGPT, ModernGPT, token_cross_entropy
from minigpt_pl.training.optim import OptimizerConfig, build_optimizer

pytestmark = pytest.mark.bench
ROUNDS = 8
VOCAB = 61
ADAMW = OptimizerConfig(lr=1e-4, weight_decay=0.08, optimizer="adamw")
PLAIN: dict[str, Any] = {"tie_embeddings": True, "zero_init": False, "conv_kernel_size": 0}


def ours(n_experts: int) -> ModernGPT:
    """modern_moe_char_02, or its dense twin."""
    sizes: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 192, "dropout": 0.24}
    experts: dict[str, Any] = {"n_experts": n_experts, "moe_gate": "softmax_selected", "ffn_mult": 2.0}
    return ModernGPT(ModernConfig(vocab_size=VOCAB, **sizes, **experts, **PLAIN), seed=1)


def reference(n_experts: int) -> ReferenceModel:
    return ReferenceModel(VOCAB, 192, 4, 4, 128, 0.24, n_experts)


def stepper(
    model: Any, loss_of: Callable[[Any, Tensor, Tensor], Tensor], batch: int, block: int, optim: OptimizerConfig = ADAMW
) -> Callable[[], None]:
    """One whole update on random tokens: forward, backward, clipping, optimizer."""
    optimizer = build_optimizer(model, optim)
    ids = torch.randint(VOCAB, (batch, block + 1))

    def step() -> None:
        loss_of(model, ids[:, :-1], ids[:, 1:].contiguous()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    logits, aux = model(x)
    return token_cross_entropy(logits, y).mean() + 0.0015 * aux


def reference_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    logits, aux = model(x)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0.0015 * aux


def test_step_of_the_sparse_model(report: Report) -> None:
    competitors = {
        "ours, MoE": stepper(ours(4), our_loss, 48, 192),
        "ours, dense twin": stepper(ours(0), our_loss, 48, 192),
        "reference, MoE": stepper(reference(4), reference_loss, 48, 192),
        "reference, dense twin": stepper(reference(0), reference_loss, 48, 192),
    }
    report.add("training step, modern_moe_char_02, 48 x 192 tokens", "s", interleaved(competitors, ROUNDS))
    for name in ("reference, MoE", "ours, MoE"):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            competitors[name]()
        print(name, profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40))


def test_step_of_the_classic_model(report: Report, nanogpt: ModuleType | None, hugging_face: ModuleType | None) -> None:
    classic = ClassicConfig(vocab_size=VOCAB, n_layer=4, n_head=4, n_embd=128, block_size=128, dropout=0.2)
    competitors = {"ours, classic": stepper(ClassicGPT(classic, seed=1), our_loss, 64, 128)}
    if nanogpt is not None:
        sizes = nanogpt.GPTConfig(
            block_size=128, vocab_size=VOCAB, n_layer=4, n_head=4, n_embd=128, dropout=0.2, bias=True
        )
        competitors["nanoGPT"] = stepper(nanogpt.GPT(sizes), lambda m, x, y: m(x, y)[1], 64, 128)
    if hugging_face is not None:
        config = hugging_face.GPT2Config(
            vocab_size=VOCAB, n_positions=128, n_layer=4, n_head=4, n_embd=128, tie_word_embeddings=False,
            embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        gpt2 = hugging_face.GPT2LMHeadModel(config).train()
        competitors["transformers' GPT-2"] = stepper(
            gpt2, lambda m, x, y: token_cross_entropy(m(x).logits, y).mean(), 64, 128
        )
    report.add("training step, classic 4 x 128, 64 x 128 tokens, dropout 0.2", "s", interleaved(competitors, ROUNDS))


def bf16_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loss under `--trainer.precision bf16-mixed`."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(x)
    return token_cross_entropy(logits, y).mean()


def test_step_of_a_wide_model_in_bf16(report: Report) -> None:
    """6 x 384 with windows of 256 and dropout, a quarter of `recipes/shakespeare`'s batch."""
    sizes: dict[str, Any] = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.3}
    config = ModernConfig(vocab_size=VOCAB, **sizes, ffn_mult=2.6667, **PLAIN)
    wide = [ModernGPT(config, seed=1) for _ in range(2)]
    competitors = {
        "bf16-mixed": stepper(wide[0], bf16_loss, 16, 256),
        "fp32": stepper(wide[1], our_loss, 16, 256),
    }
    report.add("training step, modern 6 x 384, 16 x 256 tokens, dropout 0.3", "s", interleaved(competitors, ROUNDS))
