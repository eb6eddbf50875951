"""Losses that a trained model should beat: n-gram models and xz on the validation split. Only counts are learned.

The command that prints them is in `cli.baselines`.
"""

import lzma
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.tokenizer import CharTokenizer

NGRAM_ORDERS = range(1, 7)
MAX_COUNTED_CHARACTERS = 20_000_000  # of the training split: the last ones, next to the validation split
MAX_BASELINE_CHARACTERS = 2_000_000  # a longer text would take many seconds, so its baselines are made on request only


def ngram_nats(train: NDArray[np.int64], scored: NDArray[np.int64], vocab_size: int) -> list[float]:
    """Mean nats per token of `scored[1:]` under interpolated n-gram models of `train`, for each of NGRAM_ORDERS.

    Witten-Bell interpolation (Bell, Cleary & Witten 1990): a context seen n times with t different followers gives the
    shorter context the weight t / (n + t). The context of a token never reaches into another split.
    """
    ids, counted = np.concatenate([train, scored]), len(train)  # (N,)
    positions = np.arange(counted + 1, len(ids))  # of the scored tokens, (S,)
    context = np.zeros(len(ids), np.int64)  # equal numbers for equal tokens before a position, (N,)
    probability = np.full(len(positions), 1 / vocab_size)  # (S,)
    nats = []
    for order in NGRAM_ORDERS:
        if order > 1:
            earlier = np.full(len(ids), -1, np.int64)  # the token order - 1 positions before, or -1
            earlier[order - 1 :] = ids[: 1 - order]
            earlier[counted : counted + order - 1] = -1
            context = np.unique(context * (vocab_size + 1) + earlier + 1, return_inverse=True)[1]
        ngram = np.unique(context * vocab_size + ids, return_inverse=True)[1]  # (N,)
        ngram_count = np.bincount(ngram[:counted], minlength=ngram.max() + 1)
        context_count = np.bincount(context[:counted], minlength=context.max() + 1)
        first = np.unique(ngram[:counted], return_index=True)[1]
        followers = np.bincount(context[first], minlength=len(context_count))
        n, t = context_count[context[positions]], followers[context[positions]]
        interpolated = (ngram_count[ngram[positions]] + t * probability) / np.maximum(n + t, 1)
        probability = np.where(n > 0, interpolated, probability)
        nats.append(float(-np.log(probability).mean()))
    return nats


def xz_bits_per_byte(train: bytes, scored: bytes) -> float:
    """Bits that xz needs for each byte of `scored` after it has compressed `train`."""
    options: Any = {"preset": 9 | lzma.PRESET_EXTREME}
    return 8 * (len(lzma.compress(train + scored, **options)) - len(lzma.compress(train, **options))) / len(scored)


def compute_baselines(path: str, train_frac: float = 0.9, test_frac: float = 0.0) -> dict[str, dict[str, float]]:
    """`split_baselines` of a text that is split by characters; raises as `TextDataModule.read`."""
    fractions = {"train_frac": train_frac, "test_frac": test_frac}
    return split_baselines(TextDataModule(path=path, **fractions, block_size=1, batch_size=1, eval_every=1))


def split_baselines(data: TextDataModule) -> dict[str, dict[str, float]]:
    """nats/char and bits/byte on the validation split of `data`, by method; raises as `TextDataModule.read`.

    n-grams are of characters, whatever the tokenizer.
    """
    last = slice(-MAX_COUNTED_CHARACTERS, None)
    train_text = data.tokenizer.decode(data.tokens("train")[last].tolist())[last]
    scored_text = data.tokenizer.decode(data.tokens("val").tolist())
    characters = CharTokenizer(data.text_stats.alphabet)
    train, scored = (characters.encode(text).astype(np.int64) for text in (train_text, scored_text))
    train_bytes, scored_bytes = train_text.encode(), scored_text.encode()
    bytes_per_char = characters.token_lengths[scored[1:], 1].mean()
    result = {}
    for order, nats in zip(NGRAM_ORDERS, ngram_nats(train, scored, len(characters.vocabulary)), strict=True):
        name = {1: "unigram", 2: "bigram", 3: "trigram"}.get(order, f"{order}-gram")
        result[name] = {"nats_per_char": nats, "bits_per_byte": nats / bytes_per_char / math.log(2)}
    bits = xz_bits_per_byte(train_bytes, scored_bytes)
    result["xz"] = {"nats_per_char": bits * math.log(2) * len(scored_bytes) / len(scored), "bits_per_byte": bits}
    return result
