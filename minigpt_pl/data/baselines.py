"""What simple methods make of a text: n-gram models and xz, the floors that a trained model should lie below.

The text is split as for training; nothing is trained here but counts.
"""

import lzma
import math
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from numpy.typing import NDArray

from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.runtime.errors import UserError

NGRAM_ORDERS = range(1, 7)
MAX_COUNTED_CHARACTERS = 20_000_000  # of the train part that is counted: its end, next to what is scored
MAX_BASELINE_CHARACTERS = 2_000_000  # characters that are counted unasked: more would take many seconds


def ngram_nats(train: NDArray[np.int64], scored: NDArray[np.int64], vocab_size: int) -> list[float]:
    """Mean nats per token of `scored[1:]` under interpolated n-gram models counted on `train`, for each of ORDERS.

    Witten-Bell interpolation (Bell, Cleary & Witten 1990): a context seen n times with t different followers gives the
    shorter context the weight t / (n + t). Each token is predicted from those before it in the same part.
    """
    ids, counted = np.concatenate([train, scored]), len(train)
    places = np.arange(counted + 1, len(ids))
    context = np.zeros(len(ids), np.int64)  # a number for the characters before each place, shared by equal ones
    probability = np.full(len(places), 1 / vocab_size)
    nats = []
    for order in NGRAM_ORDERS:
        if order > 1:
            before = np.full(len(ids), -1, np.int64)
            before[order - 1 :] = ids[: 1 - order]
            before[counted : counted + order - 1] = -1  # the parts do not see each other
            context = np.unique(context * (vocab_size + 1) + before + 1, return_inverse=True)[1]
        pair = np.unique(context * vocab_size + ids, return_inverse=True)[1]
        pairs = np.bincount(pair[:counted], minlength=pair.max() + 1)
        seen = np.bincount(context[:counted], minlength=context.max() + 1)
        first = np.unique(pair[:counted], return_index=True)[1]
        followers = np.bincount(context[first], minlength=len(seen))
        n, t = seen[context[places]], followers[context[places]]
        probability = np.where(n > 0, (pairs[pair[places]] + t * probability) / np.maximum(n + t, 1), probability)
        nats.append(float(-np.log(probability).mean()))
    return nats


def xz_bits_per_byte(train: bytes, scored: bytes) -> float:
    """What xz adds for `scored` after `train`, in bits for each byte of it."""
    options: Any = {"preset": 9 | lzma.PRESET_EXTREME}
    return 8 * (len(lzma.compress(train + scored, **options)) - len(lzma.compress(train, **options))) / len(scored)


def compute_baselines(path: str, train_frac: float = 0.9, test_frac: float = 0.0) -> dict[str, dict[str, float]]:
    """nats/char and bits/byte on the validation part of a text, by method.

    Raises:
        InputError: If the text cannot be used.
    """
    data = TextDataModule(path, 1, 1, 1, train_frac=train_frac, test_frac=test_frac)
    decode = data.tokenizer.decode
    train, scored = (data.tokens(part) for part in ("train", "val"))
    train, scored = train[-MAX_COUNTED_CHARACTERS:].astype(np.int64), scored.astype(np.int64)
    train_bytes, scored_bytes = (decode(ids.tolist()).encode() for ids in (train, scored))
    bytes_per_char = data.tokenizer.token_lengths[scored[1:], 1].mean()
    result = {}
    for order, nats in zip(NGRAM_ORDERS, ngram_nats(train, scored, data.vocab_size), strict=True):
        name = {1: "unigram", 2: "bigram", 3: "trigram"}.get(order, f"{order}-gram")
        result[name] = {"nats_per_char": nats, "bits_per_byte": nats / bytes_per_char / math.log(2)}
    bits = xz_bits_per_byte(train_bytes, scored_bytes)
    result["xz"] = {"nats_per_char": bits * math.log(2) * len(scored_bytes) / len(scored), "bits_per_byte": bits}
    return result


def run(command: str, options: list[str]) -> int:
    """Prints the floors of a text."""
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description=__doc__)
    parser.add_argument("--data.path", type=str, default="data/input.txt", help="The text.")
    parser.add_argument("--data.train_frac", type=float, default=0.9, help="Share of the characters to count.")
    parser.add_argument("--data.test_frac", type=float, default=0.0, help="Share, from the end, that is left out.")
    said = parser.parse_args(options).data
    if not isinstance(said.path, str):
        raise UserError("--data.path must be a file")
    found = compute_baselines(said.path, said.train_frac, said.test_frac)
    print(f"{'method':10}{'nats/char':>12}{'bits/byte':>12}")
    for name, figures in found.items():
        print(f"{name:10}{figures['nats_per_char']:12.4f}{figures['bits_per_byte']:12.4f}")
    return 0
