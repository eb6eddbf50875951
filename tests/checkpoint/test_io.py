"""Checkpoint files: whole or not there, whatever the disk does; a damaged one is known and named."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from support.runs import SMALL, at_micro_batch, differences

from minigpt_pl.checkpoint.io import AtomicCheckpointIO, iter_tensors, read_checkpoint, tensor_digest
from minigpt_pl.runtime.errors import UserError

Call = Callable[..., Outcome]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which the tests of this file copy."""
    from minigpt_pl.__main__ import main

    home = tmp_path_factory.mktemp("trained")
    (home / "text.txt").write_text("the sea comes in, the sea goes out.\n" * 60, "utf-8")
    options = ("fit", *SMALL, "--data.path", home / "text.txt", "--run_dir", home / "run")
    assert main([str(word) for word in options]) == 0
    return home / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def place_of(data: bytes, tensor: torch.Tensor) -> int:
    """Where the file has a tensor's bytes."""
    found = data.find(tensor.contiguous().numpy().tobytes())
    assert found > 0
    return found


def test_any_flipped_byte_of_weights_and_optimizer_state_is_noticed(run: Path) -> None:
    path = run / "last.ckpt"
    data, checkpoint = path.read_bytes(), read_checkpoint(path)
    weights = checkpoint["state_dict"]["net.blocks.0.attention.qkv.weight"]
    moments = checkpoint["optimizer_states"][0]["state"]
    vectors = next(state for state in moments.values() if "exp_avg" in state)
    for tensor in (weights, moments[0]["momentum"], vectors["exp_avg"], vectors["exp_avg_sq"]):
        for offset in (0, tensor.nbytes // 2, tensor.nbytes - 1):
            broken = bytearray(data)
            broken[place_of(data, tensor) + offset] ^= 1
            path.write_bytes(broken)
            with pytest.raises(UserError, match=r"last.ckpt is damaged.*best.ckpt is there: try it"):
                read_checkpoint(path)


def test_the_digest_sees_every_element_of_every_tensor(run: Path) -> None:
    """Also where the file's own check sums were made to fit."""
    checkpoint = read_checkpoint(run / "last.ckpt")
    before = tensor_digest(checkpoint)
    seen = 0
    for _, tensor in iter_tensors([checkpoint["state_dict"], checkpoint["optimizer_states"]]):
        element = tensor.view(-1)[-1:]
        value = element.clone()
        element += 1
        assert tensor_digest(checkpoint) != before
        element.copy_(value)
        seen += 1
    assert seen > 50
    assert tensor_digest(checkpoint) == before


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_a_damaged_file_is_named_with_the_next_best(minigpt: Call, run: Path, command: str) -> None:
    data = (run / "last.ckpt").read_bytes()
    for broken in (data[: len(data) // 2], b"", b"no checkpoint at all"):
        (run / "last.ckpt").write_bytes(broken)
        outcome = minigpt(command, "--run_dir", run, "--ckpt_path", "last")
        assert outcome.status == 2
        assert str(run / "last.ckpt") in outcome.err
        assert f"{run / 'best.ckpt'} is there: try it" in outcome.err
        assert outcome.err.count("\n") == 1


def test_a_missing_file_is_said_with_the_next_best(minigpt: Call, run: Path) -> None:
    (run / "last.ckpt").unlink()
    outcome = minigpt("fit", "--run_dir", run, "--ckpt_path", "last")
    assert outcome.status == 2
    assert f"there is no {run / 'last.ckpt'}; {run / 'best.ckpt'} is there: try it" in outcome.err


def test_a_failing_write_leaves_the_earlier_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, before = run / "last.ckpt", (run / "last.ckpt").read_bytes()
    checkpoint = read_checkpoint(path)
    for failing in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*args: Any) -> None:
                raise OSError(5, "Input/output error")

            patch.setattr(os, failing, fail)
            with pytest.raises(UserError, match=r"last.ckpt could not be written \(Input/output error\)"):
                AtomicCheckpointIO().save_checkpoint(checkpoint, path)
        assert path.read_bytes() == before
        assert not list(run.glob("*.writing"))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced whole, then renamed, then the folder is synced."""
    done: list[str] = []
    replace, fsync = os.replace, os.fsync

    def noted_fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(f"fsync {Path(name).name} {os.fstat(descriptor).st_size if os.path.isfile(name) else ''}")
        fsync(descriptor)

    def noted_replace(source: Any, target: Any) -> None:
        done.append(f"replace {Path(source).name} {Path(target).name}")
        replace(source, target)

    checkpoint = read_checkpoint(run / "last.ckpt")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    AtomicCheckpointIO().save_checkpoint(checkpoint, run / "last.ckpt")
    size = (run / "last.ckpt").stat().st_size
    assert done == [f"fsync last.ckpt.writing {size}", "replace last.ckpt.writing last.ckpt", "fsync run "]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for less than two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_said_and_costs_nothing(
    minigpt: Call, small_disk: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ("fit", *SMALL, "--data.path", text_file)
    assert minigpt(*options, "--run_dir", tmp_path / "straight").status == 0
    for step, name in ((3, ""), (4, "/last.ckpt")):  # where a row of metrics.csv is due, and a checkpoint
        run, full = small_disk / f"run{step}", small_disk / "full"
        with at_micro_batch(step, partial(fill, full)):
            outcome = minigpt(*options, "--run_dir", run)
        full.unlink()
        assert outcome.status == 2
        assert outcome.err.startswith(f"error: {run}{name} could not be written (No space left on device)")
        assert outcome.err.count("\n") == 1
        assert not list(run.glob("*.writing"))
        assert read_checkpoint(run / "last.ckpt")["global_step"] == 0
        shutil.move(run, tmp_path)
        assert minigpt("fit", "--run_dir", tmp_path / run.name, "--ckpt_path", "last").status == 0
        assert differences(tmp_path / "straight", tmp_path / run.name) == []


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


def test_a_limit_on_file_sizes_is_said(minigpt: Call, tmp_path: Path, text_file: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        outcome = minigpt("fit", *SMALL, "--data.path", text_file, "--run_dir", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.status == 2
    assert "could not be written (File too large)" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_said(minigpt: Call, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (Path("/proc/run"), tmp_path / "file", tmp_path / "file" / "run"):
        outcome = minigpt("fit", *SMALL, "--data.path", text_file, "--run_dir", place)
        assert outcome.status == 2
        assert outcome.err.startswith(f"error: --run_dir {place} cannot be written")
        assert outcome.err.count("\n") == 1


def test_a_checkpoint_holds_plain_values_only(run: Path) -> None:
    """It loads with weights_only, names no path but the text's, and needs nothing beside it."""
    checkpoint = torch.load(run / "best.ckpt", weights_only=True)
    words = [value for value in leaves(checkpoint) if isinstance(value, str) and str(run.parents[1]) in value]
    assert [word for word in words if not word.endswith("text.txt")] == []


def leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from leaves(value)
    else:
        yield node
