"""Spans of one text in another: against a plain search for each span."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt_pl.data.copies import CopyFinder

SHORT = st.text("ab\u05d0", max_size=40)


@given(SHORT, SHORT, st.integers(1, 12))
def test_spans_are_those_of_a_plain_search(source: str, text: str, length: int) -> None:
    finder = CopyFinder(source, text)
    wanted = [i for i in range(len(text) - length + 1) if text[i : i + length] in source]
    assert finder.starts(length).tolist() == wanted
    spans = len(text) - length + 1
    assert finder.share(length) == pytest.approx(len(wanted) / spans if spans > 0 else math.nan, nan_ok=True)


@given(SHORT, SHORT)
def test_the_longest_span_is_that_of_a_plain_search(source: str, text: str) -> None:
    spans = [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1) if text[i:j] in source]
    best = max(map(len, spans), default=0)
    longest = CopyFinder(source, text).longest()
    assert len(longest) == best
    assert longest in source
    assert longest in text


def test_a_span_does_not_reach_from_the_source_into_the_text() -> None:
    assert CopyFinder("xab", "cdabcd").starts(3).tolist() == []
    assert CopyFinder("xabc", "dabcd").longest() == "abc"
