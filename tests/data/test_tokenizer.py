"""Characters and byte pairs: round trips, JSON, and merges that follow their options."""

import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt_pl.data.tokenizer import (
    MAX_LINE_CHARACTERS,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    iter_lines,
    load_tokenizer,
)
from minigpt_pl.runtime.errors import UserError

TEXT = "she sells sea shells\non the sea shore\n\nthe shells she sells\nare sea shells, sure\n" * 3
ANY = st.text(min_size=1, max_size=60)
FEW = st.text(st.sampled_from("aab\n"), min_size=1, max_size=40)
"""Texts of so few characters that pairs repeat and overlap."""
MAX_LINES = st.integers(2, 7) | st.none()
"""Short lines, or None for merges across lines."""


def train(
    text: str, vocab_size: int = 60, min_pair_freq: int = 2, max_line: int | None = MAX_LINE_CHARACTERS
) -> BPETokenizer:
    return BPETokenizer.train("".join(sorted(set(text))), [text], vocab_size, min_pair_freq, max_line)


def tokenizers_of(text: str) -> list[Tokenizer]:
    """A tokenizer of each kind for a text; the bpe tokenizers have merges if the text allows any."""
    vocab_size = len(set(text)) + 20
    return [CharTokenizer(text), train(text, vocab_size), train(text, vocab_size, max_line=None)]


@given(ANY | FEW)
def test_decoding_restores_the_text(text: str) -> None:
    for tokenizer in tokenizers_of(text):
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text
        assert set(ids) <= set(range(len(tokenizer.vocabulary)))


@given(ANY | FEW)
def test_a_dumped_and_loaded_tokenizer_has_the_same_ids_and_hash(text: str) -> None:
    for tokenizer in tokenizers_of(text):
        loaded = load_tokenizer(tokenizer.dump(), tokenizer.sha256)
        assert loaded.vocabulary == tokenizer.vocabulary
        assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert (loaded.dump(), loaded.sha256) == (tokenizer.dump(), tokenizer.sha256)
        assert json.loads(tokenizer.dump())["kind"] == tokenizer.kind


def test_a_definition_from_before_merges_could_cross_lines_is_unchanged() -> None:
    definition = (
        '{"kind": "bpe", "longest": 1024, "merges": [["a", "b"]], "vocabulary": ["\\n", "a", "b", "ab"]}'
    )  # fmt: skip
    assert train("ab\nab\n", 4).dump() == definition
    assert load_tokenizer(definition).dump() == definition


def test_a_tokenizer_with_the_hash_of_another_is_refused() -> None:
    """With a vocabulary of the same size the model would load, and write nonsense."""
    tokenizer, other = CharTokenizer("abc"), CharTokenizer("abd")
    with pytest.raises(UserError, match="differs from its hash"):
        load_tokenizer(other.dump(), tokenizer.sha256)


@given(FEW, st.lists(st.integers(0, 40), max_size=6), MAX_LINES)
def test_the_boundaries_of_chunks_do_not_matter(text: str, cuts: list[int], max_line: int | None) -> None:
    chunks = [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])]
    bpe = train(text)
    for tokenizer in (CharTokenizer(text), BPETokenizer(bpe.vocabulary, bpe.merges, max_line)):
        ids = [i for array in tokenizer.encode_chunks(chunks) for i in array.tolist()]
        assert ids == tokenizer.encode(text).tolist()
    assert [line for lines in iter_lines(chunks, max_line) for line in lines if line] == cut(text, max_line)


def cut(text: str, max_line: int | None) -> list[str]:
    """Lines, each with its newline, and cut if they are too long; character by character. The text if None."""
    if max_line is None:
        return [text]
    lines, line = [], ""
    for character in text:
        if len(line) == max_line:
            lines.append(line)
            line = ""
        line += character
        if character == "\n":
            lines.append(line)
            line = ""
    return lines + [line] * bool(line)


def test_the_ids_are_as_small_as_the_vocabulary_allows() -> None:
    planes = "".join(chr(i) for i in range(0x20000) if not 0xD800 <= i < 0xE000)
    for size, width in [(255, 1), (256, 2), (65_535, 2), (65_536, 4)]:
        characters = planes[-size:]
        tokenizer = CharTokenizer(characters)
        assert tokenizer.encode(characters).tolist() == list(range(size))
        assert tokenizer.encode(characters).itemsize == width


# The options of the bpe tokenizer.


def reference(
    text: str, vocab_size: int, min_pair_freq: int, max_line: int | None
) -> tuple[list[str], list[tuple[str, str]], list[list[str]]]:
    """Vocabulary and merges by the definition: repeatedly the most frequent pair, the one with lower ids on ties.

    With the tokens of each line.
    """
    vocabulary, merges = sorted(set(text)), []
    words = [list(line) for line in cut(text, max_line)]
    while len(vocabulary) < vocab_size:
        count = Counter(pair for word in words for pair in pairwise(word))
        ids = {token: i for i, token in enumerate(vocabulary)}
        ranked = sorted(count, key=lambda pair: (-count[pair], ids[pair[0]], ids[pair[1]]))
        if not ranked or count[ranked[0]] < min_pair_freq:
            break
        merges.append(ranked[0])
        if "".join(ranked[0]) not in ids:
            vocabulary.append("".join(ranked[0]))
        words = [merge(word, ranked[0]) for word in words]
    return vocabulary, merges, words


def merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


@given(
    FEW | st.text(st.sampled_from("abcde fgh\n"), max_size=120).map("x".__add__),
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([MAX_LINE_CHARACTERS, None]),
)
def test_merges_are_the_most_frequent_pairs_above_min_pair_freq(
    text: str, more: int, min_pair_freq: int, max_line: int | None
) -> None:
    vocab_size = len(set(text)) + more
    tokenizer = train(text, vocab_size, min_pair_freq, max_line)
    expected = reference(text, vocab_size, min_pair_freq, max_line)
    assert (tokenizer.vocabulary, tokenizer.merges) == expected[:2]
    assert len(tokenizer.vocabulary) <= vocab_size


def test_a_text_is_merged_across_lines_as_by_the_plain_algorithm() -> None:
    """On words as frequent as in a language: many pairs tie, and most merges span a space or a line end."""
    draw = random.Random(4)
    words = ["".join(draw.choices("aeinorst", k=draw.randint(1, 6))) for _ in range(60)]
    text = "".join(draw.choice(words[: draw.randint(1, 60)]) + draw.choice("    \n") for _ in range(1200))
    tokenizer = train(text, 140, 2, max_line=None)
    vocabulary, merges, (tokens,) = reference(text, 140, 2, None)
    assert (tokenizer.vocabulary, tokenizer.merges) == (vocabulary, merges)
    assert [vocabulary[i] for i in tokenizer.encode(text)] == tokens
    assert any("\n" in token[:-1] for token in tokens)
    assert len(text) > 4000


def test_of_equally_frequent_pairs_that_of_the_lowest_ids_is_merged() -> None:
    """In cdab cdab each pair inside a word occurs twice: a b has lower ids than c d and d a; then c d than d ab."""
    assert train("cdab\ncdab", 7, 2, max_line=None).merges == [("a", "b"), ("c", "d")]


def test_overlapping_pairs_count() -> None:
    """In aaa aaa, a a occurs four times at overlapping positions, twice otherwise; b c occurs three times."""
    assert train("aaa aaa bc,bc.bc", 9, 2, max_line=None).merges[:1] == [("a", "a")]


def test_merges_cross_line_ends_only_where_asked() -> None:
    text = "a\nb" * 20
    assert "\nb" in train(text, max_line=None).vocabulary
    assert "\nb" not in train(text).vocabulary
    assert len(train(text, max_line=None).encode(text)) < len(train(text).encode(text))


@given(FEW)
def test_a_newline_ends_a_token_and_long_lines_are_cut(text: str) -> None:
    vocabulary = train(text, 60, 1).vocabulary
    assert all("\n" not in token[:-1] for token in vocabulary)
    short = BPETokenizer(vocabulary, train(text, 60, 1).merges, max_line=3)
    assert all(len(short.vocabulary[i]) <= 3 for i in short.encode(text))


@given(FEW, MAX_LINES)
def test_the_library_cuts_lines_in_the_same_way(text: str, max_line: int | None) -> None:
    """`export` writes the library's definition."""
    bpe = train(text)
    tokenizer = BPETokenizer(bpe.vocabulary, bpe.merges, max_line)
    assert tokenizer.library.encode(text).ids == tokenizer.encode(text).tolist()


def test_the_smallest_vocabulary_holds_the_characters() -> None:
    alphabet = "".join(sorted(set(TEXT)))
    assert train(TEXT, len(alphabet)).vocabulary == list(alphabet)
    with pytest.raises(
        UserError, match=f"bpe_vocab_size 5: .* {len(alphabet)} distinct .*; use at least {len(alphabet)}"
    ):
        train(TEXT, 5)


def test_a_character_that_is_only_in_the_alphabet_is_a_token() -> None:
    tokenizer = BPETokenizer.train("z" + "".join(set(TEXT)), [TEXT], 60, 2)
    assert tokenizer.decode(tokenizer.encode("zzsea").tolist()) == "zzsea"


def test_training_is_deterministic_and_shortens_the_text() -> None:
    tokenizer = train(TEXT)
    assert tokenizer.dump() == train(TEXT).dump()
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2


@pytest.mark.parametrize("tokenizer", tokenizers_of(TEXT), ids=["char", "bpe", "bpe across lines"])
def test_unknown_characters_are_named(tokenizer: Tokenizer) -> None:
    for text in ("sea Ünd", "\U0010ffff", "\x00"):  # between, above and below the known characters
        with pytest.raises(UserError) as refusal:
            tokenizer.encode(text)
        assert all(repr(c) in str(refusal.value) for c in set(text) - set(TEXT))
        assert repr("s") not in str(refusal.value)
    with pytest.raises(UserError, match=r"\.\.\.;"):
        tokenizer.encode("ABCDEFGHIJKLMNOP")


@given(ANY | FEW)
def test_the_lengths_of_tokens_sum_to_those_of_the_text(text: str) -> None:
    for tokenizer in tokenizers_of(text):
        assert tokenizer.token_lengths[tokenizer.encode(text)].sum(0).tolist() == [len(text), len(text.encode())]


def test_an_empty_prompt_is_a_newline_or_the_first_token() -> None:
    for tokenizer in tokenizers_of(TEXT):
        assert tokenizer.decode(tokenizer.encode_prompt("")) == "\n"
        assert tokenizer.decode(tokenizer.encode_prompt("sea")) == "sea"
    for tokenizer in tokenizers_of("sea"):
        assert tokenizer.decode(tokenizer.encode_prompt("")) == "a"
