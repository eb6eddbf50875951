"""Reading a text file: what its bytes become in pieces of any size, and what is said of a file that will not do.

The bar, the memory of files already read, and the cut into parts are here too; what follows is in test_data.
"""

import codecs
import hashlib
import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minigpt_pl.data import corpus as text_room
from minigpt_pl.data.corpus import iter_chunks, iter_split_chunks, read_stats
from minigpt_pl.runtime.errors import UserError

MIXED = st.text(st.sampled_from("ab \n\r\x00é\u0301\ufeff漢🌊\u2028"), min_size=1, max_size=30)
"""Short texts in which line ends, marks and characters of one to four bytes meet often."""

small_pieces = st.integers(1, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def write(folder: Path, data: bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(data)
    return path


def converted(data: bytes) -> str:
    """What the text should be, by Python's own means."""
    return data.decode("utf-8-sig").replace("\r\n", "\n")


@given(MIXED, st.booleans(), small_pieces)
def test_any_utf8_becomes_the_same_text_in_pieces_of_any_size(folder: Path, text: str, bom: bool, size: int) -> None:
    data = codecs.BOM_UTF8 * bom + text.encode()
    with patch.object(text_room, "CHUNK_BYTES", size):
        assert "".join(iter_chunks(write(folder, data), "")) == converted(data)


@given(MIXED, small_pieces)
def test_hash_alphabet_and_sizes_are_those_of_the_converted_text(folder: Path, text: str, size: int) -> None:
    data = text.encode()
    expected = converted(data)
    assume(not expected.isspace() and expected)
    with patch.object(text_room, "CHUNK_BYTES", size):
        info = read_stats(write(folder, data), folder / "cache")
    assert info.sha256 == hashlib.sha256(expected.encode()).hexdigest()
    assert (info.characters, info.bytes) == (len(expected), len(expected.encode()))
    assert info.alphabet == "".join(sorted(set(expected)))


def test_a_line_end_of_two_bytes_may_lie_across_pieces_and_a_lone_cr_stays(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbfa\r\nb\rc\r\r\nd\r")
    for size in range(1, 15):
        with patch.object(text_room, "CHUNK_BYTES", size):
            assert "".join(iter_chunks(path, "")) == "a\nb\rc\r\nd\r"


@given(
    MIXED,
    st.sampled_from([b"\xff", b"\xe9t\xe9", b"\xed\xa0\x80", b"\xc0\x80", b"\xf0\x9f\x8c"]),
    MIXED,
    st.booleans(),
    small_pieces,
)
def test_the_first_byte_that_is_not_utf8_is_named(
    folder: Path, before: str, wrong: bytes, after: str, bom: bool, size: int
) -> None:
    data = codecs.BOM_UTF8 * bom + before.encode() + wrong + after.encode()
    with pytest.raises(UnicodeDecodeError) as theirs:
        data.decode()
    place = theirs.value.start
    with (
        patch.object(text_room, "CHUNK_BYTES", size),
        pytest.raises(UserError, match=f"byte {place} is 0x{data[place]:02x}"),
    ):
        list(iter_chunks(write(folder, data), ""))


@given(MIXED, st.lists(st.integers(0, 30), min_size=2, max_size=2), small_pieces)
def test_parts_share_no_character_and_leave_none_out(folder: Path, text: str, ends: list[int], size: int) -> None:
    text = converted(text.encode())
    first, second = sorted(min(end, len(text)) for end in ends)
    found = ["", "", ""]
    with patch.object(text_room, "CHUNK_BYTES", size):
        for part, piece in iter_split_chunks(
            write(folder, codecs.BOM_UTF8 + text.encode()), [first, second, len(text)], ""
        ):
            found[part] += piece
    assert found == [text[:first], text[first:second], text[second:]]


# What is remembered.


@pytest.fixture
def known(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A text that was read, the cache, and the note that remembers it."""
    path, cache = write(tmp_path, b"one two"), tmp_path / "cache"
    read_stats(path, cache)
    (note,) = cache.iterdir()
    return path, cache, note


def test_an_unchanged_file_is_not_read_again(known: tuple[Path, Path, Path]) -> None:
    path, cache, note = known
    remembered = json.loads(note.read_text("utf-8"))
    note.write_text(json.dumps(remembered | {"characters": 12345}), "utf-8")
    assert read_stats(path, cache).characters == 12345, "the note was not used"


def test_a_file_changed_in_place_is_read_again_even_with_its_old_time(known: tuple[Path, Path, Path]) -> None:
    path, cache, _ = known
    before = path.stat()
    path.write_bytes(b"two one")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_stats(path, cache).sha256 == hashlib.sha256(b"two one").hexdigest()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"sha256": "0"}', "\x00" * 50])
def test_a_damaged_note_is_made_anew(known: tuple[Path, Path, Path], damage: str) -> None:
    path, cache, note = known
    whole = note.read_text("utf-8")
    note.write_text(damage, "utf-8")
    assert read_stats(path, cache).characters == 7
    assert note.read_text("utf-8") == whole


def test_a_bar_shows_the_reading_of_a_large_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, b"word " * 1000)
    list(iter_chunks(path, "tokenizing"))
    assert capfd.readouterr() == ("", "")
    with patch.object(text_room, "LARGE_FILE_BYTES", 1000):
        list(iter_chunks(path, "tokenizing"))
    out, err = capfd.readouterr()
    assert out == ""
    assert "tokenizing: 100%" in err


# What will not do.


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b" \n\t\r\n ", "is blank, 5 characters"),
        ("text".encode("utf-16"), "is UTF-16, by its first two bytes: convert it to UTF-8"),
        (codecs.BOM_UTF16_BE + "text".encode("utf-16-be"), "is UTF-16"),
    ],
)
def test_a_file_without_text_is_refused_with_its_remedy(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_stats(write(tmp_path, data), tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, said in [
        (tmp_path, "is a directory"),
        (tmp_path / "no", "does not exist"),
        (Path("/dev/null"), "no regular file"),
    ]:
        with pytest.raises(UserError, match=said):
            read_stats(path, tmp_path)
