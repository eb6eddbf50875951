"""Generation: token ids in, an iterator of token ids out. Knows models and probabilities, but not text.

When the window is full, it is shortened to its last half, which is read again. Cached and uncached generation
therefore compute the same function, for any length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.generation.incremental import make_decode_fn, supports
from minigpt_pl.models.gpt import GPT
from minigpt_pl.runtime.ranges import (
    NonNegativeFinite,
    NonNegativeInt,
    Probability,
    SampleCount,
    TokenCount,
    check_ranges,
)
from minigpt_pl.runtime.seeding import uniform

SINGLE_THREAD_MACS = 2**23
"""Multiplications of one position below which waking a second thread costs more time than it saves."""


@dataclass
class SamplingConfig:
    """How the next token is chosen.

    Args:
        max_new_tokens: Tokens to generate after a prompt.
        temperature: Divides the logits; 0 always takes the most likely token.
        top_k: Sample from the k most likely tokens; 0 for all.
        top_p: Sample from the most likely tokens that together reach this probability; 1 for all.
        seed: Seed of the samples; with the prompt and the sample's number it decides the text.
        num_samples: Samples for each prompt.

    Raises:
        UserError: If a value is out of its range.
    """

    max_new_tokens: TokenCount = 300
    temperature: NonNegativeFinite = 0.8
    top_k: NonNegativeInt = 0
    top_p: Probability = 1.0
    seed: NonNegativeInt = 1337
    num_samples: SampleCount = 1

    def __post_init__(self) -> None:
        check_ranges(self, "sample")


def sample_uniforms(seed: int, prompt: Sequence[int], sample: int, count: int) -> Tensor:
    """The `count` numbers in [0, 1) that decide sample number `sample` of a prompt, (count,) in fp32."""
    draws = uniform(count, seed, "sample", sample, *prompt)
    return torch.from_numpy(np.floor(draws * 2**24).astype(np.float32) * np.float32(2**-24))  # never rounded up to 1


def sample_next_token(logits: Tensor, draws: Tensor, sampling: SamplingConfig) -> Tensor:
    """The next token (S,) of each stream, from logits (S, V) and one uniform number each (S,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    # The maximum is subtracted first: 0 / T is 0, however small T is.
    probs = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)  # (S, V)
    order = None
    if 0 < sampling.top_k < logits.size(-1) or sampling.top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            probs = probs[:, : sampling.top_k]
        if sampling.top_p < 1:
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, 0)  # the most likely one always stays
    cumulative = probs.cumsum(-1)
    index = torch.searchsorted(cumulative, (draws * cumulative.select(1, -1)).unsqueeze(1), right=True)
    index = index.clamp_(max=probs.size(-1) - 1)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


def single_threaded(decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function on one thread; torch's number of threads is restored after each call."""

    def call(ids: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return decode(ids)
        finally:
            torch.set_num_threads(threads)

    return call


@torch.inference_mode()
def generate(
    model: GPT, prompt: Sequence[int], sampling: SamplingConfig, use_cache: bool = True
) -> Iterator[list[int]]:
    """Continues a prompt in `sampling.num_samples` streams at once.

    Args:
        model: In eval mode.
        prompt: Token ids, at least one; the last block_size of them are read.
        sampling: How to choose the next token.
        use_cache: Whether keys and values are kept from token to token, where the model is known; only the speed
            differs.

    Yields:
        The next token of each stream, `sampling.max_new_tokens` times.
    """
    assert not model.training, "generation is for eval mode"
    device, streams = model.token_embedding.weight.device, sampling.num_samples
    columns = [sample_uniforms(sampling.seed, prompt, i, sampling.max_new_tokens) for i in range(streams)]
    draws = torch.stack(columns, 1).to(device)  # (max_new_tokens, S)
    window = [*torch.tensor(prompt[-model.block_size :], device=device).expand(streams, -1).unbind(1)]  # T of (S,)
    cache = model.new_cache() if use_cache and supports(model) else None
    decode = make_decode_fn(model, cache) if cache else None
    if decode and streams * model.params_active() < SINGLE_THREAD_MACS:
        decode = single_threaded(decode)
    read_window = True  # the first time, and after the window has been shortened
    for i in range(sampling.max_new_tokens):
        if decode and not read_window:
            logits = decode(window[-1])
        else:
            logits = model(torch.stack(window, 1), *([cache] if cache else []))[0][:, -1]
        tokens = sample_next_token(logits, draws[i], sampling)
        yield tokens.tolist()
        window.append(tokens)
        read_window = len(window) > model.block_size
        if read_window:
            window = window[-max(1, model.block_size // 2) :]
