"""Generation speed: ours against the reference model, nanoGPT and transformers, at modern_moe_char_02's size."""

from types import ModuleType

import pytest
import torch
from benchmarks.bench_training import VOCAB, ours, reference
from benchmarks.measuring import Report, interleaved

from minigpt_pl.generation.generate import SamplingConfig, generate

pytestmark = pytest.mark.bench
TOKENS = 300


def per_second(seconds: dict[str, list[float]], tokens: int) -> dict[str, list[float]]:
    return {name: [tokens / value for value in values] for name, values in seconds.items()}


def test_one_stream(report: Report, nanogpt: ModuleType | None, hugging_face: ModuleType | None) -> None:
    moe, dense, reference_moe = ours(4).eval(), ours(0).eval(), reference(4).eval()
    start = torch.zeros(1, 1, dtype=torch.long)
    competitors = {
        "ours, MoE": lambda: list(generate(moe, [0], SamplingConfig(max_new_tokens=TOKENS))),
        "ours, dense twin": lambda: list(generate(dense, [0], SamplingConfig(max_new_tokens=TOKENS))),
        "reference, MoE": lambda: reference_moe.generate(start, TOKENS),
    }
    if nanogpt is not None:
        sizes = nanogpt.GPTConfig(
            block_size=192, vocab_size=VOCAB, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=True
        )
        classic = nanogpt.GPT(sizes).eval()
        competitors["nanoGPT"] = lambda: classic.generate(start, TOKENS, temperature=0.8)
    if hugging_face is not None:
        config = hugging_face.LlamaConfig(
            vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None,
        )  # fmt: skip
        llama, options = hugging_face.LlamaForCausalLM(config).eval(), dict(do_sample=True, temperature=0.8, top_k=0)
        competitors["transformers' Llama, dense twin"] = lambda: llama.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=TOKENS, pad_token_id=0, **options
        )
    report.add("one stream of 300 tokens", "tokens/s", per_second(interleaved(competitors, rounds=6, warmup=1), TOKENS))


def test_many_streams(report: Report) -> None:
    moe = ours(4).eval()
    competitors = {
        "ours, MoE, 32 streams": lambda: list(generate(moe, [0], SamplingConfig(max_new_tokens=TOKENS, num_samples=32)))
    }
    report.add(
        "32 streams of 300 tokens together",
        "tokens/s",
        per_second(interleaved(competitors, rounds=6, warmup=1), 32 * TOKENS),
    )


def test_time_per_token_does_not_grow(report: Report) -> None:
    moe = ours(4).eval()
    competitors = {
        f"{count} tokens": lambda count=count: list(generate(moe, [0], SamplingConfig(max_new_tokens=count)))
        for count in (300, 1200, 4800)
    }
    seconds = interleaved(competitors, rounds=3, warmup=1)
    milliseconds = {name: [1000 * s / int(name.split()[0]) for s in values] for name, values in seconds.items()}
    report.add("time per token by length of the text", "ms", milliseconds)
