"""Baselines: n-gram probabilities against counting by hand, sums to one, and the command's table."""

import math
from collections import Counter

import numpy as np
import pytest

from minigpt_pl.data.baselines import NGRAM_ORDERS, compute_baselines, ngram_nats, split_baselines, xz_bits_per_byte
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.token_cache import SPLITS
from minigpt_pl.data.tokenizer import CharTokenizer


def witten_bell(train: list[int], context: tuple[int, ...], token: int, vocab_size: int) -> float:
    """The same probability, from dictionaries, one context after the other."""
    probability = 1 / vocab_size
    for length in range(len(context) + 1):
        tail = context[len(context) - length :]
        followers = Counter(
            train[i] for i in range(length, len(train)) if tuple(train[i - length : i]) == tail
        )  # fmt: skip
        n, t = sum(followers.values()), len(followers)
        if n:
            probability = (followers[token] + t * probability) / (n + t)
    return probability


def test_ngrams_equal_counting_by_hand():
    rng = np.random.default_rng(3)
    train, scored = rng.integers(4, size=60), rng.integers(4, size=25)
    for order, nats in zip(NGRAM_ORDERS, ngram_nats(train, scored, 4), strict=True):
        expected = [
            -math.log(witten_bell(train.tolist(), tuple(scored[max(0, i - order + 1) : i].tolist()), scored[i], 4))
            for i in range(1, len(scored))
        ]
        assert nats == pytest.approx(np.mean(expected), rel=1e-12), order


def test_probabilities_sum_to_one():
    train = np.random.default_rng(4).integers(3, size=50)
    for context in ((), (0,), (2, 1), (1, 1, 1)):
        assert sum(witten_bell(train.tolist(), context, token, 3) for token in range(3)) == pytest.approx(1)


def test_a_text_that_repeats_itself_is_cheap(text_file):
    result = compute_baselines(str(text_file))
    assert result["6-gram"]["nats_per_char"] < 0.5 < 2 < result["unigram"]["nats_per_char"]
    assert result["unigram"]["bits_per_byte"] == pytest.approx(result["unigram"]["nats_per_char"] / math.log(2))


def test_baselines_of_a_data_module_score_its_own_splits(tmp_path):
    """Split by tokens, a text validates on other characters: those of its end, however they are tokenized."""
    path = tmp_path / "text.txt"
    path.write_text("the sea comes in, the sea goes out.\n" * 40 + "other words, quite unlike these\n" * 20, "utf-8")
    options = {"block_size": 8, "batch_size": 2, "eval_every": 1, "train_frac": 0.7, "test_frac": 0.1}
    data = TextDataModule(path=str(path), tokenizer="bpe", split_unit="tokens", bpe_vocab_size=60, **options)
    train, val, _ = ("".join(data.tokenizer.vocabulary[i] for i in data.tokens(split)) for split in SPLITS)
    characters = CharTokenizer(data.text_stats.alphabet)
    ids = [characters.encode(part).astype(np.int64) for part in (train, val)]
    found = split_baselines(data)
    nats = [values["nats_per_char"] for name, values in found.items() if name != "xz"]
    assert nats == ngram_nats(*ids, len(characters.vocabulary))
    assert found["xz"]["bits_per_byte"] == xz_bits_per_byte(train.encode(), val.encode())
    assert found != compute_baselines(str(path), 0.7, 0.1)


def test_bytes_of_another_script(tmp_path):
    path = tmp_path / "greek.txt"
    path.write_text("αβγδ αγβδ\n" * 200, "utf-8")
    result = compute_baselines(str(path))
    letters, all_characters = 8, 10
    bytes_per_char = (2 * letters + 2) / all_characters
    nats, bits = result["bigram"]["nats_per_char"], result["bigram"]["bits_per_byte"]
    assert bits == pytest.approx(nats / math.log(2) / bytes_per_char, rel=5e-3)  # the split ends somewhere in a line


def test_xz_knows_what_came_before():
    text = bytes(np.random.default_rng(5).integers(256, size=4000, dtype=np.uint8))
    assert xz_bits_per_byte(text, text) < 1 < xz_bits_per_byte(b"", text)


def test_the_command(minigpt, text_file):
    outcome = minigpt("baselines", "--data.path", text_file)
    assert outcome.status == 0
    rows = [line.split() for line in outcome.out.splitlines()]
    assert [row[0] for row in rows] == ["method", "unigram", "bigram", "trigram", "4-gram", "5-gram", "6-gram", "xz"]
    assert float(rows[2][1]) == pytest.approx(compute_baselines(str(text_file))["bigram"]["nats_per_char"], abs=1e-4)


def test_a_mistake_is_one_line(minigpt, text_file, tmp_path):
    for args in (("--data.path", tmp_path / "none.txt"), ("--data.path", text_file, "--data.train_frac", 1)):
        outcome = minigpt("baselines", *args)
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
