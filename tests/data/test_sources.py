"""Texts of several files: which files there are, where they are cut, and that no window runs over two of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, Outcome
from hypothesis import given
from hypothesis import strategies as st

from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.datasets import Segments, TrainDataset, epoch_starts, windows_in_epoch
from minigpt_pl.data.sources import find_files
from minigpt_pl.runtime.errors import UserError

MiniGPT = Callable[..., Outcome]
TEXTS = {"b.txt": "bcde" * 50, "a.txt": "afgh\n" * 40, "deep/c.txt": "lijk" * 30}
"""The files of each test; no character is in two of them."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text, "utf-8")
    (tmp_path / "texts" / ".hidden").write_text("no", "utf-8")
    return tmp_path / "texts"


def module(path: Any, **options: Any) -> TextDataModule:
    sizes = {"block_size": 8, "batch_size": 4, "eval_every": 1, **options}
    return TextDataModule(path=[str(p) for p in path] if isinstance(path, list) else str(path), **sizes)


def texts(data: TextDataModule) -> list[str]:
    return [data.tokenizer.decode(data.tokens(split).tolist()) for split in ("train", "val", "test")]


def test_a_directory_a_glob_and_a_list_name_files_in_sorted_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = folder / "a.txt", folder / "b.txt", folder / "deep/c.txt"
    assert find_files(str(folder)) == (a, b, c)
    assert find_files(str(folder / "*.txt")) == (a, b)
    assert find_files(str(folder / "**/*.txt")) == (a, b, c)
    assert find_files([str(b), str(folder / "deep"), str(a), str(b)]) == (a, b, c)
    monkeypatch.chdir(folder)
    assert find_files("*.txt") == (Path("a.txt"), Path("b.txt"))
    (folder / "x[1].txt").write_text("a file that looks like a glob", "utf-8")
    assert find_files("x[1].txt") == (Path("x[1].txt"),)


@pytest.mark.parametrize(
    ("path", "line"), [("none*.txt", "no file matches it"), ("empty", "has no files"), ([], "no file")]
)
def test_a_path_without_files_is_an_error(
    path: Any, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line):
        find_files(path)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_joint_cuts_the_files_as_one_text(folder: Path, tmp_path: Path, tokenizer: str) -> None:
    whole = "\n".join(TEXTS[name] for name in ("a.txt", "b.txt", "deep/c.txt"))
    (tmp_path / "whole.txt").write_text(whole, "utf-8")
    options = {"tokenizer": tokenizer, "bpe_vocab_size": 40, "test_frac": 0.1, "train_frac": 0.6}
    several, one = module(folder, **options), module(tmp_path / "whole.txt", **options)
    assert texts(several) == texts(one)
    assert several.text_stats.sha256 == one.text_stats.sha256
    assert several.tokenizer.sha256 == one.tokenizer.sha256
    assert several.text_stats.characters == one.text_stats.characters == len(whole)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize("cached", [True, False])
def test_per_file_cuts_each_file(
    folder: Path, tokenizer: str, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("cache" if cached else "file")))
    options = {"tokenizer": tokenizer, "bpe_vocab_size": 40, "test_frac": 0.1, "train_frac": 0.6, "split": "per_file"}
    files = [TEXTS[name] for name in ("a.txt", "b.txt", "deep/c.txt")]
    ends = [(0, int(0.6 * len(text)), int(0.9 * len(text)), len(text)) for text in files]
    wanted = ["".join(t[e[i] : e[i + 1]] for t, e in zip(files, ends, strict=True)) for i in range(3)]
    for _ in range(2):  # the second time from the cache
        data = module(folder, **options)
        assert texts(data) == wanted
        lengths = data.read().tokens["train"].lengths
        assert len(lengths) == 3
        if tokenizer == "char":
            assert lengths == tuple(e[1] for e in ends)


def files_of(text: str) -> set[str]:
    """The files that a text may be from."""
    return {name for name, content in TEXTS.items() if set(text) <= set(content)}


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_no_window_runs_over_two_files(folder: Path, sampling: Any) -> None:
    data = module(folder, split="per_file", sampling=sampling)
    loader = data.train_dataloader()
    seen: set[str] = set()
    for i in range(60):
        batch = loader.dataset[i]
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            files = files_of(data.tokenizer.decode([inputs[0], *targets]))
            assert files
            seen |= files
    assert seen == set(TEXTS)


@pytest.mark.parametrize("mode", ["full", "sampled"])
def test_an_evaluation_reads_each_file_by_itself(folder: Path, mode: Any) -> None:
    data = module(folder, split="per_file", eval_mode=mode, train_frac=0.5, eval_iters=3)
    loaders = data.val_dataloader()
    (loader,) = [loaders] if not isinstance(loaders, list) else loaders
    scored: list[str] = []
    for batch in loader:
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            own = [t for t in targets if t >= 0]
            if own:
                text = data.tokenizer.decode([inputs[0], *own])
                assert files_of(text)
                scored.append(text[1:])
    if mode == "full":
        parts = [TEXTS[name][len(TEXTS[name]) // 2 :] for name in ("a.txt", "b.txt", "deep/c.txt")]
        assert "".join(scored) == "".join(part[1:] for part in parts)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 9))
def test_every_window_of_each_segment_has_one_number(lengths: list[int], size: int) -> None:
    segments = Segments(lengths)
    begins = np.cumsum([0, *lengths[:-1]])
    wanted = [b + i for b, n in zip(begins, lengths, strict=True) for i in range(n - size)]
    assert segments.window_starts(size, np.arange(segments.choices(size))).tolist() == wanted
    starts = segments.covering_starts(size)
    spans = zip(starts, segments.end_behind(starts), strict=True)
    covered = [t for start, end in spans for t in range(start + 1, min(start + 1 + size, end))]
    assert covered == [b + i for b, n in zip(begins, lengths, strict=True) for i in range(1, n)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 3))
def test_an_epoch_has_no_target_twice_and_stays_in_its_segment(lengths: list[int], size: int, epoch: int) -> None:
    if max(lengths) <= size:
        return
    starts = epoch_starts(tuple(lengths), size, 7, epoch)
    assert len(starts) == windows_in_epoch(lengths, size).sum()
    targets = [s + 1 + i for s in starts for i in range(size)]
    assert len(set(targets)) == len(targets)
    ends = Segments(lengths).end_behind(starts)
    assert (starts + size < ends).all()


def test_a_single_segment_draws_the_windows_that_it_always_drew() -> None:
    ids = np.arange(100, dtype=np.uint8)
    one, named = TrainDataset(ids, 8, 4, seed=3), TrainDataset(ids, 8, 4, seed=3, lengths=(100,))
    assert all((one[i].inputs == named[i].inputs).all() for i in range(5))


def test_a_run_of_several_files_resumes_from_anywhere(
    folder: Path, minigpt: MiniGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("--model.block_size", 8, "--data.split", "per_file", "--trainer.max_steps", 4, "--data.eval_every", 2)
    monkeypatch.chdir(folder.parent)
    run = tmp_path / "run"
    done = minigpt("fit", *TINY, *sizes, "--data.path", "texts/*.txt", "--run_dir", run, "--data.train_frac", 0.8)
    assert done.status == 0, done.err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data_files"] == ["a.txt", "b.txt"]
    assert summary["config"]["data"]["path"] == "texts/*.txt"
    (tmp_path / "other_place").mkdir()
    monkeypatch.chdir(tmp_path / "other_place")
    assert minigpt("validate", "--run_dir", run, "--ckpt_path", "best").status == 0
    longer = minigpt("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 6)
    assert longer.status == 0, longer.err
    (folder / "b.txt").write_text("another text" * 40, "utf-8")
    refused = minigpt("validate", "--run_dir", run, "--ckpt_path", "best")
    assert refused.status == 2
    assert "not the text that the checkpoint was trained on" in refused.err


def test_a_list_of_files_stands_in_a_config(folder: Path, minigpt: MiniGPT, tmp_path: Path) -> None:
    paths = f"[{folder / 'b.txt'}, {folder / 'a.txt'}]"
    (tmp_path / "mine.yaml").write_text(f"data:\n  path: {paths}\n  split: per_file\n", "utf-8")
    sizes = ("--model.block_size", 8, "--trainer.max_steps", 2, "--data.eval_every", 2, "--data.train_frac", 0.8)
    done = minigpt("fit", *TINY, "-c", tmp_path / "mine.yaml", *sizes, "--run_dir", tmp_path / "run")
    assert done.status == 0, done.err
    again = minigpt(
        "fit", *TINY, *sizes, f"--data.path={paths}", "--data.split=per_file", "--run_dir", tmp_path / "again"
    )
    assert again.status == 0, again.err
    files = [json.loads((tmp_path / name / "summary.json").read_text())["data_files"] for name in ("run", "again")]
    assert files == [["a.txt", "b.txt"]] * 2


def test_what_per_file_does_not_work_with_is_refused(folder: Path) -> None:
    for option in ({"split_unit": "tokens"}, {"bpe_across_lines": True, "tokenizer": "bpe"}):
        with pytest.raises(UserError, match=f"data.split per_file: it does not work with data.{next(iter(option))}"):
            module(folder, split="per_file", **option)
    with pytest.raises(UserError, match="its train split has .* tokens in its longest file"):
        module(folder, split="per_file", block_size=190).read()
