"""Generation: what is read when, what is drawn from what, and by which probabilities.

Bad settings and prompts are the command line's; here is the function from token ids to token ids.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import KINDS, VOCAB, build, lively, some_ids
from torch import Tensor

from minigpt_pl.generation import generate as generate_module
from minigpt_pl.generation.generate import SamplingConfig, generate, sample_next_token
from minigpt_pl.models.gpt import GPT

PROMPT = [1, 3, 0, 4, 2]
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 1.0}


def streams(model: GPT, prompt: Sequence[int] = PROMPT, use_cache: bool = True, **sampling: Any) -> list[list[int]]:
    """The tokens of each sample."""
    steps = list(generate(model, prompt, SamplingConfig(**sampling), use_cache))
    return [list(stream) for stream in zip(*steps, strict=True)]


def watch(monkeypatch: pytest.MonkeyPatch, model: GPT, note: Callable[[Tensor], None]) -> None:
    """Calls `note` with whatever ids the model reads, one position or many."""
    embed, make_decode_fn = model.embed, generate_module.make_decode_fn

    def many(ids: Tensor) -> Tensor:
        note(ids)
        return embed(ids)

    def one_by_one(*args: Any) -> Callable[[Tensor], Tensor]:
        step = make_decode_fn(*args)

        def noting(ids: Tensor) -> Tensor:
            note(ids.unsqueeze(1))
            return step(ids)

        return noting

    monkeypatch.setattr(model, "embed", many)
    monkeypatch.setattr(generate_module, "make_decode_fn", one_by_one)


def steady(probabilities: Sequence[float]) -> GPT:
    """A model whose next token has these probabilities, whatever came before."""
    model = build("classic", vocab_size=len(probabilities))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.bias[0] = 1
        model.head.weight[:, 0] = torch.tensor(probabilities).log()
    return model


# What is read: the window and the cache.


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, SAMPLED | {"top_k": 5, "top_p": 0.9, "num_samples": 3}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_no_token(kind: str, sampling: dict[str, Any]) -> None:
    model = lively(kind)
    cached = streams(model, max_new_tokens=3 * model.block_size, **sampling)
    assert cached == streams(model, use_cache=False, max_new_tokens=3 * model.block_size, **sampling)
    assert [len(stream) for stream in cached] == [3 * model.block_size] * sampling.get("num_samples", 1)
    assert all(len(set(stream)) > 2 for stream in cached), "a text that repeats itself tells nothing"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_full_window_drops_to_its_last_half(kind: str) -> None:
    model, window, expected = lively(kind, block_size=10), some_ids(14, seed=5).tolist()[-10:], []
    for _ in range(30):
        token = int(model(torch.tensor([window]))[0][0, -1].argmax())
        expected.append(token)
        window.append(token)
        if len(window) > 10:
            window = window[-5:]
    assert streams(model, some_ids(14, seed=5).tolist(), max_new_tokens=30, **GREEDY) == [expected]


@pytest.mark.parametrize(
    ("block_size", "prompt", "cached", "uncached"),
    [
        (8, 3, [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1], [3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4, 5]),
        (8, 20, [8, 4, 1, 1, 1, 1, 4], [8, 4, 5, 6, 7, 8, 4]),
        (5, 5, [5, 2, 1, 1, 1, 2, 1], [5, 2, 3, 4, 5, 2, 3]),
        (1, 2, [1, 1, 1, 1], [1, 1, 1, 1]),
    ],
)
def test_how_many_positions_are_read(
    block_size: int, prompt: int, cached: list[int], uncached: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("dense", block_size=block_size)
    read: list[int] = []
    watch(monkeypatch, model, lambda ids: read.append(ids.size(1)))
    for use_cache, expected in ((True, cached), (False, uncached)):
        read.clear()
        streams(model, some_ids(prompt).tolist(), use_cache, max_new_tokens=len(expected))
        assert read == expected


def test_a_long_prompt_counts_by_its_end() -> None:
    model, prompt = lively("dense"), some_ids(40).tolist()
    assert streams(model, prompt, max_new_tokens=20, **GREEDY) == streams(
        model, prompt[-16:], max_new_tokens=20, **GREEDY
    )
    assert streams(model, prompt, max_new_tokens=20, **GREEDY) != streams(
        model, prompt[:16], max_new_tokens=20, **GREEDY
    )


def test_tokens_come_one_by_one() -> None:
    model = build("dense")
    texts = generate(model, PROMPT, SamplingConfig(max_new_tokens=1000))
    assert len(next(texts)) == len(next(texts)) == 1
    with pytest.raises(AssertionError):
        next(generate(build("dense").train(), PROMPT, SamplingConfig()))


# What is drawn: from the seed, the prompt and the sample's number.


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_on_seed_prompt_and_number_alone(kind: str) -> None:
    model = lively(kind)
    torch.manual_seed(1)
    three = streams(model, max_new_tokens=20, num_samples=3, **SAMPLED)
    torch.manual_seed(2)
    assert streams(model, max_new_tokens=20, num_samples=1, **SAMPLED) == three[:1]
    assert streams(model, max_new_tokens=9, num_samples=2, **SAMPLED) == [stream[:9] for stream in three[:2]]
    assert streams(model, max_new_tokens=20, num_samples=5, **SAMPLED)[:3] == three
    assert len({tuple(stream) for stream in three}) == 3
    assert streams(model, max_new_tokens=20, num_samples=3, seed=1338, **SAMPLED) != three


def test_another_prompt_draws_anew_and_the_same_prompt_does_not() -> None:
    model = steady([1 / 16] * 16)  # it never looks at the prompt: only the draws can differ
    first = streams(model, [1, 2], max_new_tokens=20, **SAMPLED)
    assert streams(model, [1, 2], max_new_tokens=20, **SAMPLED) == first
    others = [streams(model, prompt, max_new_tokens=20, **SAMPLED) for prompt in ([2, 1], [12], [1, 2, 0], [1])]
    assert first not in others
    assert len({tuple(other[0]) for other in others}) == len(others)


def test_generation_leaves_the_global_generators_alone() -> None:
    model = lively("switch")
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    streams(model, max_new_tokens=20, num_samples=2, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


# By which probabilities.


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How far counts are from what is expected, in standard deviations of the chi-square statistic."""
    expected = counts.sum() * probabilities
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    logits = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    probabilities = logits ** (1 / temperature) / (logits ** (1 / temperature)).sum()
    model = steady(logits.tolist())
    tokens = np.array(streams(model, max_new_tokens=60, num_samples=200, temperature=temperature))
    assert chi_square(np.bincount(tokens.flatten(), minlength=5), probabilities) < 5
    pairs = np.outer(probabilities, probabilities).flatten()
    for first, second in ((tokens[:, :-1], tokens[:, 1:]), (tokens[:-1], tokens[1:])):  # steps, then samples
        assert chi_square(np.bincount((first * 5 + second).flatten(), minlength=25), pairs) < 5


def test_the_smallest_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 90.0, -3.0], [80.0, 2.0, 79.0]])
    assert sample_next_token(logits, torch.tensor([0.999, 0.999]), SamplingConfig(temperature=1e-38)).tolist() == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_the_likeliest_and_so_does_a_choice_of_one(kind: str) -> None:
    model = lively(kind)
    greedy = streams(model, max_new_tokens=30, num_samples=2, **GREEDY)
    assert greedy[0] == greedy[1]
    assert streams(model, max_new_tokens=30, top_k=1, **SAMPLED) == greedy[:1]
    assert streams(model, max_new_tokens=30, top_p=1e-9, **SAMPLED) == greedy[:1]
    assert streams(model, max_new_tokens=30, top_k=3, top_p=0.5, **GREEDY) == greedy[:1]
    assert streams(model, max_new_tokens=30, **SAMPLED) != greedy[:1]


@pytest.mark.parametrize(
    "off", [{"top_k": VOCAB}, {"top_k": VOCAB + 1}, {"top_k": 10**6}, {"top_k": 0}, {"top_p": 1.0}]
)
def test_a_choice_among_all_is_no_restriction(off: dict[str, Any]) -> None:
    model = lively("dense")
    assert streams(model, max_new_tokens=30, **off, **SAMPLED) == streams(model, max_new_tokens=30, **SAMPLED)


@pytest.mark.parametrize(
    ("restriction", "left"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 0]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 0]),
        ({"top_p": 0.96}, [1, 3, 0, 4, 2]),
        ({"top_k": 2, "top_p": 0.99}, [1, 3]),
        ({"top_k": 4, "top_p": 0.5}, [1, 3]),
        ({"top_p": 0.71, "temperature": 0.5}, [1, 3]),  # of the probabilities after the temperature
    ],
)
def test_only_the_likeliest_are_left_and_keep_their_proportions(restriction: dict[str, Any], left: list[int]) -> None:
    probabilities = np.array([0.15, 0.4, 0.05, 0.3, 0.1])
    sampling = SAMPLED | restriction
    tokens = np.array(streams(steady(probabilities.tolist()), max_new_tokens=50, num_samples=60, **sampling))
    counts = np.bincount(tokens.flatten(), minlength=5)
    assert set(np.flatnonzero(counts)) == set(left)
    expected = probabilities[left] ** (1 / sampling["temperature"])
    if len(left) > 1:
        assert chi_square(counts[left], expected / expected.sum()) < 5


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"temperature": -0.1}, "sample.temperature -0.1"),
        ({"temperature": math.nan}, "sample.temperature nan"),
        ({"temperature": math.inf}, "sample.temperature inf"),
        ({"top_k": -1}, "sample.top_k -1"),
        ({"top_p": 0.0}, "sample.top_p 0.0"),
        ({"top_p": 1.1}, "sample.top_p 1.1"),
        ({"top_p": math.nan}, "sample.top_p nan"),
        ({"max_new_tokens": 0}, "sample.max_new_tokens 0"),
        ({"max_new_tokens": 10**8}, "sample.max_new_tokens 100000000"),
        ({"num_samples": 10**5}, "sample.num_samples 100000"),
        ({"num_samples": 0}, "sample.num_samples 0"),
        ({"seed": -1}, "sample.seed -1"),
    ],
)
def test_settings_without_meaning_are_refused_by_name(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingConfig(**bad)


@pytest.mark.parametrize(("sizes", "expected"), [({}, 1), ({"n_embd": 1024, "n_layer": 1}, 2)])
def test_a_small_model_is_read_by_one_thread_and_the_others_are_given_back(
    sizes: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, threads = build("classic", **sizes), []
    watch(monkeypatch, model, lambda ids: threads.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        for _ in generate(model, PROMPT, SamplingConfig(max_new_tokens=3)):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert threads == [2, expected, expected]  # the prompt is read by all
