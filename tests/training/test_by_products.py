"""Files beside a checkpoint that anything may have changed: what cannot be read is set aside, and the run resumes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from support.runs import eval_steps, train_small

from minigpt_pl.training.by_products import read_summary, read_whole_samples


def spreadsheet(content: bytes) -> bytes:
    return content.replace(b",", b";")


@pytest.mark.parametrize(
    ("change", "aside"),
    [
        (lambda content: b"\xef\xbb\xbf" + content, False),
        (lambda content: content + b"16,tra", False),
        (spreadsheet, True),
        (lambda content: content.replace(b"\n5,val", b"\n5.0,val"), True),
        (lambda content: b"\x00" * 50, True),
        (lambda content: content.decode().encode("utf-16"), True),
    ],
    ids=["byte-order mark", "torn row", "semicolons", "other numbers", "zeros", "utf-16"],
)
def test_metrics_that_were_changed_do_not_block_a_resume(
    change: Callable[[bytes], bytes], aside: bool, minigpt: Callable[..., Outcome], tmp_path: Path
) -> None:
    run = train_small(tmp_path)
    before, file = eval_steps(run), run / "metrics.csv"
    file.write_bytes(change(file.read_bytes()))
    outcome = minigpt("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 20)
    assert outcome.status == 0, outcome.err
    assert ("metrics.csv cannot be read" in outcome.err) == aside
    assert len(list(run.glob("aside-*/metrics.csv"))) == aside
    assert eval_steps(run) == ([20] if aside else [*before[:-1], 20])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("=== step 4\nsea\n=== step 8\nsé", [(4, "sea")]),
        ("=== step 4\nsea\n=== step 1", [(4, "sea")]),
        ("my notes\n=== step 4\nsea\n", [(4, "sea")]),
        ("=== step 4\r\nsea\r\n", []),
    ],
)
def test_samples_that_are_not_whole_are_set_aside(
    content: str, expected: list[tuple[int, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "samples.txt"
    data = content.encode()
    file.write_bytes(data[:-1] if content.endswith("é") else data)
    assert read_whole_samples(file) == expected
    assert "moved to" in capsys.readouterr().err
    assert not file.exists()


def test_whole_samples_stay(tmp_path: Path) -> None:
    file = tmp_path / "samples.txt"
    file.write_text("=== step 4\nsea\n\n=== step 8\nsand\n", "utf-8")
    assert read_whole_samples(file) == [(4, "sea\n"), (8, "sand")]
    assert file.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00", '{"total_steps": 3}'])
def test_a_summary_that_is_none_counts_as_missing(content: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(content, "utf-8")
    assert read_summary(tmp_path / "summary.json") is None
