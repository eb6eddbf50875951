"""Reading a text file: what its bytes become in chunks of any size, splits, the cache of statistics, and bad files."""

import codecs
import hashlib
import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minigpt_pl.data import corpus
from minigpt_pl.data.corpus import iter_chunks, iter_split_chunks, read_stats
from minigpt_pl.runtime.errors import UserError

MIXED = st.text(st.sampled_from("ab \n\r\x00é\u0301\ufeff漢🌊\u2028"), min_size=1, max_size=30)
"""Short texts with many line ends, byte order marks and characters of one to four bytes."""

small_chunks = st.integers(1, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def write(folder: Path, data: bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(data)
    return path


def converted(data: bytes) -> str:
    """The expected text, from Python's own decoder."""
    return data.decode("utf-8-sig").replace("\r\n", "\n")


@given(MIXED, st.booleans(), small_chunks)
def test_any_utf8_becomes_the_same_text_in_chunks_of_any_size(folder: Path, text: str, bom: bool, size: int) -> None:
    data = codecs.BOM_UTF8 * bom + text.encode()
    with patch.object(corpus, "CHUNK_BYTES", size):
        assert "".join(iter_chunks(write(folder, data), "")) == converted(data)


@given(MIXED, small_chunks)
def test_hash_alphabet_and_sizes_are_those_of_the_converted_text(folder: Path, text: str, size: int) -> None:
    data = text.encode()
    expected = converted(data)
    assume(not expected.isspace() and expected)
    with patch.object(corpus, "CHUNK_BYTES", size):
        stats = read_stats([write(folder, data)], folder / "cache")
    assert stats.sha256 == hashlib.sha256(expected.encode()).hexdigest()
    assert (stats.characters, stats.bytes) == (len(expected), len(expected.encode()))
    assert stats.alphabet == "".join(sorted(set(expected)))


def test_a_line_end_of_two_bytes_may_lie_in_two_chunks_and_a_lone_cr_stays(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbfa\r\nb\rc\r\r\nd\r")
    for size in range(1, 15):
        with patch.object(corpus, "CHUNK_BYTES", size):
            assert "".join(iter_chunks(path, "")) == "a\nb\rc\r\nd\r"


@given(
    MIXED,
    st.sampled_from([b"\xff", b"\xe9t\xe9", b"\xed\xa0\x80", b"\xc0\x80", b"\xf0\x9f\x8c"]),
    MIXED,
    st.booleans(),
    small_chunks,
)
def test_the_first_byte_that_is_not_utf8_is_named(
    folder: Path, before: str, wrong: bytes, after: str, bom: bool, size: int
) -> None:
    data = codecs.BOM_UTF8 * bom + before.encode() + wrong + after.encode()
    with pytest.raises(UnicodeDecodeError) as expected:
        data.decode()
    byte = expected.value.start
    with (
        patch.object(corpus, "CHUNK_BYTES", size),
        pytest.raises(UserError, match=f"byte {byte} is 0x{data[byte]:02x}"),
    ):
        list(iter_chunks(write(folder, data), ""))


@given(MIXED, st.lists(st.integers(0, 30), min_size=2, max_size=2), small_chunks)
def test_splits_share_no_character_and_miss_none(folder: Path, text: str, ends: list[int], size: int) -> None:
    text = converted(text.encode())
    first, second = sorted(min(end, len(text)) for end in ends)
    path, splits = write(folder, codecs.BOM_UTF8 + text.encode()), ["", "", ""]
    with patch.object(corpus, "CHUNK_BYTES", size):
        for split, chunk in iter_split_chunks([path], [first, second, len(text)], ""):
            splits[split] += chunk
    assert splits == [text[:first], text[first:second], text[second:]]


# The cache.


@pytest.fixture
def cached(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A text that was read, the cache, and its entry there."""
    path, cache = write(tmp_path, b"one two"), tmp_path / "cache"
    read_stats([path], cache)
    (entry,) = cache.iterdir()
    return path, cache, entry


def test_an_unchanged_file_is_not_read_again(cached: tuple[Path, Path, Path]) -> None:
    path, cache, entry = cached
    stats = json.loads(entry.read_text("utf-8"))
    entry.write_text(json.dumps(stats | {"characters": 12345}), "utf-8")
    assert read_stats([path], cache).characters == 12345, "the entry was not used"


def test_a_file_changed_in_place_is_read_again_even_with_its_old_time(cached: tuple[Path, Path, Path]) -> None:
    path, cache, _ = cached
    before = path.stat()
    path.write_bytes(b"two one")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_stats([path], cache).sha256 == hashlib.sha256(b"two one").hexdigest()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"sha256": "0"}', "\x00" * 50])
def test_a_damaged_entry_is_replaced(cached: tuple[Path, Path, Path], damage: str) -> None:
    path, cache, entry = cached
    intact = entry.read_text("utf-8")
    entry.write_text(damage, "utf-8")
    assert read_stats([path], cache).characters == 7
    assert entry.read_text("utf-8") == intact


def test_a_progress_bar_is_shown_for_a_large_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, b"word " * 1000)
    list(iter_chunks(path, "tokenizing"))
    assert capfd.readouterr() == ("", "")
    with patch.object(corpus, "LARGE_FILE_BYTES", 1000):
        list(iter_chunks(path, "tokenizing"))
    out, err = capfd.readouterr()
    assert out == ""
    assert "tokenizing: 100%" in err


# Bad files.

WORDS = "the sea comes in, the sea goes out\n" * 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty; name another text file"),
        (b"\xef\xbb\xbf", "it is empty"),
        (b" \n\t\r\n ", "it has 5 characters, all white space"),
        ("text".encode("utf-16"), "it is UTF-16, by its first two bytes; convert it to UTF-8"),
        (codecs.BOM_UTF16_BE + "text".encode("utf-16-be"), "it is UTF-16"),
        *((WORDS.encode(f"utf-16-{end}"), "it looks like UTF-16: from byte [01] on") for end in ("le", "be")),
        *((WORDS.encode(f"utf-32-{end}"), "it looks like UTF-32: from byte [0-3] on") for end in ("le", "be")),
        (("a" * corpus.CHUNK_BYTES + WORDS).encode("utf-16-le"), "it looks like UTF-16: from byte 0 on"),
        (b"a" * 50 + WORDS.encode("utf-16-le"), "it looks like UTF-16: from byte (49|50) on"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        read_stats([write(tmp_path, data)], tmp_path)
    assert (refusal.value.option, refusal.value.value) == ("data.path", tmp_path / "text.txt")


def test_a_path_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    for path, problem in [
        (tmp_path, "it is a directory"),
        (tmp_path / "no", "the file does not exist"),
        (Path("/dev/null"), "it is not a regular file"),
    ]:
        with pytest.raises(UserError, match=problem):
            read_stats([path], tmp_path)
