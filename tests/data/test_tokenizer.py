"""Characters and byte pairs: there and back, as JSON, and merges that are what their settings say."""

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt_pl.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, iter_lines, load_tokenizer
from minigpt_pl.runtime.errors import UserError

TEXT = "she sells sea shells\non the sea shore\n\nthe shells she sells\nare sea shells, sure\n" * 3
ANY = st.text(min_size=1, max_size=60)
FEW = st.text(st.sampled_from("aab\n"), min_size=1, max_size=40)
"""Texts of so few characters that pairs repeat and overlap."""


def train(text: str, vocab_size: int = 60, min_pair_freq: int = 2) -> BPETokenizer:
    return BPETokenizer.train("".join(sorted(set(text))), [text], vocab_size, min_pair_freq)


def both(text: str) -> list[Tokenizer]:
    """A tokenizer of each kind for a text, with merges where it has any."""
    return [CharTokenizer(text), train(text, len(set(text)) + 20)]


@given(ANY | FEW)
def test_a_text_comes_back(text: str) -> None:
    for tokenizer in both(text):
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text
        assert set(ids) <= set(range(len(tokenizer.vocabulary)))


@given(ANY | FEW)
def test_json_out_and_in_changes_neither_ids_nor_hash(text: str) -> None:
    for tokenizer in both(text):
        again = load_tokenizer(tokenizer.dump(), tokenizer.sha256)
        assert again.vocabulary == tokenizer.vocabulary
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert (again.dump(), again.sha256) == (tokenizer.dump(), tokenizer.sha256)
        assert json.loads(tokenizer.dump())["kind"] == tokenizer.kind


def test_another_tokenizer_under_the_same_hash_is_refused() -> None:
    """Of the same size, it would load, and the model would write nonsense."""
    tokenizer, other = CharTokenizer("abc"), CharTokenizer("abd")
    with pytest.raises(UserError, match="differs from its hash"):
        load_tokenizer(other.dump(), tokenizer.sha256)


@given(FEW, st.lists(st.integers(0, 40), max_size=6), st.integers(2, 7))
def test_where_a_text_is_cut_into_pieces_makes_no_difference(text: str, cuts: list[int], longest: int) -> None:
    places = [0, *sorted(cuts), len(text)]
    texts = [text[a:b] for a, b in pairwise(places)]
    merged = train(text)
    for tokenizer in (CharTokenizer(text), BPETokenizer(merged.vocabulary, merged.merges, longest)):
        pieces = [i for ids in tokenizer.encode_chunks(texts) for i in ids.tolist()]
        assert pieces == tokenizer.encode(text).tolist()
    assert [line for found in iter_lines(texts, longest) for line in found if line] == cut(text, longest)


def cut(text: str, longest: int) -> list[str]:
    """Lines, each with its newline, and those that are too long cut; character by character."""
    found, line = [], ""
    for character in text:
        if len(line) == longest:
            found.append(line)
            line = ""
        line += character
        if character == "\n":
            found.append(line)
            line = ""
    return found + [line] * bool(line)


def test_the_ids_are_as_small_as_the_vocabulary_allows() -> None:
    planes = "".join(chr(i) for i in range(0x20000) if not 0xD800 <= i < 0xE000)
    for size, width in [(255, 1), (256, 2), (65_535, 2), (65_536, 4)]:
        characters = planes[-size:]
        tokenizer = CharTokenizer(characters)
        assert tokenizer.encode(characters).tolist() == list(range(size))
        assert tokenizer.encode(characters).itemsize == width


# What the settings of byte pairs mean.


def reference(text: str, vocab_size: int, min_pair_freq: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Vocabulary and merges by the definition: again and again the most frequent pair, the one of lower ids on ties."""
    vocabulary, merges = sorted(set(text)), []
    words = [list(line) for line in cut(text, 1024)]
    while len(vocabulary) < vocab_size:
        seen = Counter(pair for word in words for pair in pairwise(word))
        ids = {token: i for i, token in enumerate(vocabulary)}
        ranked = sorted(seen, key=lambda pair: (-seen[pair], ids[pair[0]], ids[pair[1]]))
        if not ranked or seen[ranked[0]] < min_pair_freq:
            break
        merges.append(ranked[0])
        if "".join(ranked[0]) not in ids:
            vocabulary.append("".join(ranked[0]))
        words = [merged(word, ranked[0]) for word in words]
    return vocabulary, merges


def merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


@given(
    FEW | st.text(st.sampled_from("abcde fgh\n"), max_size=120).map("x".__add__), st.integers(1, 20), st.integers(1, 5)
)
def test_merges_are_the_most_frequent_pairs_and_none_seen_less_often_than_asked(
    text: str, more: int, min_pair_freq: int
) -> None:
    vocab_size = len(set(text)) + more
    found = train(text, vocab_size, min_pair_freq)
    assert (found.vocabulary, found.merges) == reference(text, vocab_size, min_pair_freq)
    assert len(found.vocabulary) <= vocab_size


@given(FEW)
def test_a_newline_ends_a_token_and_a_line_is_cut_at_its_longest(text: str) -> None:
    vocabulary = train(text, 60, 1).vocabulary
    assert all("\n" not in token[:-1] for token in vocabulary)
    cut_short = BPETokenizer(vocabulary, train(text, 60, 1).merges, longest=3)
    assert all(len(cut_short.vocabulary[i]) <= 3 for i in cut_short.encode(text))


@given(FEW, st.integers(2, 7))
def test_the_library_alone_cuts_lines_as_we_do(text: str, longest: int) -> None:
    """What is exported is the library's definition."""
    merged = train(text)
    tokenizer = BPETokenizer(merged.vocabulary, merged.merges, longest)
    assert tokenizer.library.encode(text).ids == tokenizer.encode(text).tolist()


def test_characters_alone_are_the_least_vocabulary() -> None:
    alphabet = "".join(sorted(set(TEXT)))
    assert train(TEXT, len(alphabet)).vocabulary == list(alphabet)
    with pytest.raises(
        UserError, match=f"bpe_vocab_size is 5, .* {len(alphabet)} distinct .*: give at least {len(alphabet)}"
    ):
        train(TEXT, 5)


def test_a_character_that_is_only_in_the_alphabet_is_a_token() -> None:
    tokenizer = BPETokenizer.train("z" + "".join(set(TEXT)), [TEXT], 60, 2)
    assert tokenizer.decode(tokenizer.encode("zzsea").tolist()) == "zzsea"


def test_learning_twice_gives_the_same_and_merges_that_help() -> None:
    tokenizer = train(TEXT)
    assert tokenizer.dump() == train(TEXT).dump()
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2


@pytest.mark.parametrize("tokenizer", both(TEXT), ids=["char", "bpe"])
def test_characters_that_the_vocabulary_lacks_are_named(tokenizer: Tokenizer) -> None:
    for text in ("sea Ünd", "\U0010ffff", "\x00"):  # between, beyond and before the known ones
        with pytest.raises(UserError) as refusal:
            tokenizer.encode(text)
        assert all(repr(c) in str(refusal.value) for c in set(text) - set(TEXT))
        assert repr("s") not in str(refusal.value)
    with pytest.raises(UserError, match=r"\.\.\. ?:"):
        tokenizer.encode("ABCDEFGHIJKLMNOP")


@given(ANY | FEW)
def test_the_sizes_of_tokens_sum_to_those_of_the_text(text: str) -> None:
    for tokenizer in both(text):
        assert tokenizer.token_lengths[tokenizer.encode(text)].sum(0).tolist() == [len(text), len(text.encode())]


def test_an_empty_prompt_is_a_newline_or_else_the_first_token() -> None:
    for tokenizer in both(TEXT):
        assert tokenizer.decode(tokenizer.encode_prompt("")) == "\n"
        assert tokenizer.decode(tokenizer.encode_prompt("sea")) == "sea"
    for tokenizer in both("sea"):
        assert tokenizer.decode(tokenizer.encode_prompt("")) == "a"
