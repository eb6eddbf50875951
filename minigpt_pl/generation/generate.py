"""Text continues: token ids in, an iterator of token ids out. Knows models and probabilities, nothing of characters.

When the window is full, it drops to its last half, which is read again: with or without the cache the same function.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.generation.incremental import make_decode_fn
from minigpt_pl.models.gpt import GPT
from minigpt_pl.runtime.seeding import uniform


@dataclass
class SamplingConfig:
    """How the next token is chosen.

    Args:
        max_new_tokens: Tokens to add to a prompt.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Choose among the k likeliest; 0 for all.
        top_p: Choose among the likeliest that together reach this probability; 1 for all.
        seed: Of the choices; with the prompt and the sample's number it decides the text.
        num_samples: Continuations of each prompt.
    """

    max_new_tokens: int = 300
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1337
    num_samples: int = 1

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"sample.temperature is {self.temperature}: it must be 0 or a positive number")
        if self.top_k < 0:
            raise ValueError(f"sample.top_k is {self.top_k}: it must be 0, for all tokens, or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sample.top_p is {self.top_p}: it must be above 0 and at most 1")
        for name, most in (("max_new_tokens", 10**7), ("num_samples", 10**4)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"sample.{name} is {getattr(self, name)}: it must be at least 1 and at most {most:,}")
        if self.seed < 0:
            raise ValueError(f"sample.seed is {self.seed}: it must be 0 or more")


def sample_uniforms(seed: int, prompt: Sequence[int], sample: int, count: int) -> Tensor:
    """The `count` numbers in [0, 1) that decide sample number `sample` of a prompt."""
    draws = uniform(count, seed, "sample", sample, *prompt)
    return torch.from_numpy(np.floor(draws * 2**24).astype(np.float32) * np.float32(2**-24))  # never rounded up to 1


def sample_next_token(logits: Tensor, draws: Tensor, sampling: SamplingConfig) -> Tensor:
    """The next token (S,) of each stream, from logits (S, V) and one uniform number each (S,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    probs = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)  # 0 / T is 0, however small T
    order = None
    if 0 < sampling.top_k < logits.size(-1) or sampling.top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            probs = probs[:, : sampling.top_k]
        if sampling.top_p < 1:
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, 0)  # the likeliest always stays
    reach = probs.cumsum(-1)
    index = torch.searchsorted(reach, (draws * reach.select(1, -1)).unsqueeze(1), right=True)
    index = index.clamp_(max=probs.size(-1) - 1)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


SINGLE_THREAD_MACS = 2**23
"""Products of a position below which a second thread is woken for longer than it helps."""


def single_threaded(step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, which leaves torch's number of threads as it was."""

    def alone(ids: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return step(ids)
        finally:
            torch.set_num_threads(threads)

    return alone


@torch.inference_mode()
def generate(
    model: GPT, prompt: Sequence[int], sampling: SamplingConfig, use_cache: bool = True
) -> Iterator[list[int]]:
    """Continues a prompt in `sampling.num_samples` streams at once.

    Args:
        model: In eval mode.
        prompt: Token ids, at least one; the last block_size of them are read.
        sampling: How to choose.
        use_cache: Whether keys and values are kept from token to token; only the speed differs.

    Yields:
        The next token of each stream, `sampling.max_new_tokens` times.
    """
    assert not model.training, "generation is for eval mode"
    device, streams = model.token_embedding.weight.device, sampling.num_samples
    draws = torch.stack(
        [sample_uniforms(sampling.seed, prompt, i, sampling.max_new_tokens) for i in range(streams)], 1
    ).to(device)
    window = [*torch.tensor(prompt[-model.block_size :], device=device).expand(streams, -1).unbind(1)]  # of (S,)
    cache = model.new_cache() if use_cache else None
    step = make_decode_fn(model, cache) if cache else None
    if step and streams * model.params_active() < SINGLE_THREAD_MACS:
        step = single_threaded(step)
    whole = True
    for i in range(sampling.max_new_tokens):
        logits = step(window[-1]) if step and not whole else model(torch.stack(window, 1), cache)[0][:, -1]
        tokens = sample_next_token(logits, draws[i], sampling)
        yield tokens.tolist()
        window.append(tokens)
        whole = len(window) > model.block_size
        if whole:
            window = window[-max(1, model.block_size // 2) :]
