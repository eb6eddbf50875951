"""Checkpoint files are complete or absent, whatever the disk does, and damage is noticed and reported."""

import errno
import os
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from support.runs import SMALL, at_micro_batch, differences, train_small

from minigpt_pl.api import load_checkpoint
from minigpt_pl.checkpoint.io import AtomicCheckpointIO, iter_tensors, read_checkpoint, tensor_digest, write_error
from minigpt_pl.runtime.errors import UserError

Call = Callable[..., Outcome]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 16 steps, the last of which is the best."""
    return train_small(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return shutil.copytree(trained, tmp_path / "run")


def offset_of(data: bytes, tensor: torch.Tensor) -> int:
    """Offset of a tensor's bytes in a file."""
    offset = data.find(tensor.contiguous().numpy().tobytes())
    assert offset > 0
    return offset


def test_a_flipped_bit_of_weights_or_optimizer_states_is_noticed(run: Path) -> None:
    path = run / "last.ckpt"
    data, checkpoint = path.read_bytes(), read_checkpoint(path)
    weights = checkpoint["state_dict"]["net.blocks.0.feed_forward.gate_up.weight"]
    moments = checkpoint["optimizer_states"][0]["state"]
    vectors = next(state for state in moments.values() if "exp_avg" in state)
    for tensor in (weights, moments[0]["momentum"], vectors["exp_avg"], vectors["exp_avg_sq"]):
        for offset in (0, tensor.nbytes // 2, tensor.nbytes - 1):
            broken = bytearray(data)
            broken[offset_of(data, tensor) + offset] ^= 1
            path.write_bytes(broken)
            with pytest.raises(UserError, match=r"last.ckpt: the file is damaged.*; try .*best.ckpt$"):
                read_checkpoint(path)


def test_the_digest_covers_every_tensor(run: Path) -> None:
    """Also if the file's own checksums are right."""
    checkpoint = read_checkpoint(run / "last.ckpt")
    before = tensor_digest(checkpoint)
    count = 0
    for _, tensor in iter_tensors([checkpoint["state_dict"], checkpoint["optimizer_states"]]):
        element = tensor.view(-1)[-1:]
        value = element.clone()
        element += 1
        assert tensor_digest(checkpoint) != before
        element.copy_(value)
        count += 1
    assert count > 50
    assert tensor_digest(checkpoint) == before


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_a_damaged_file_is_reported_with_the_other_checkpoint(minigpt: Call, run: Path, command: str) -> None:
    data = (run / "last.ckpt").read_bytes()
    for broken in (data[: len(data) // 2], b"", b"no checkpoint at all"):
        (run / "last.ckpt").write_bytes(broken)
        outcome = minigpt(command, "--run_dir", run, "--ckpt_path", "last")
        assert outcome.status == 2
        assert outcome.err.startswith("error: --ckpt_path last: the file is ")
        assert f"; try {run / 'best.ckpt'}\n" in outcome.err
        assert outcome.err.count("\n") == 1


def test_a_missing_file_is_reported_with_the_other_checkpoint(minigpt: Call, run: Path) -> None:
    (run / "last.ckpt").unlink()
    outcome = minigpt("fit", "--run_dir", run, "--ckpt_path", "last")
    assert outcome.status == 2
    assert f"there is no {run / 'last.ckpt'}; try {run / 'best.ckpt'}" in outcome.err


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


@pytest.mark.parametrize("kind", [stat.S_ISDIR, stat.S_ISREG], ids=["directory", "file"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_is_no_error(
    kind: Callable[[int], bool], number: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, fsync = read_checkpoint(run / "last.ckpt"), os.fsync
    refused = []

    def refuse(descriptor: int) -> None:
        if kind(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    AtomicCheckpointIO().save_checkpoint(checkpoint, run / "new.ckpt")
    assert refused
    assert read_checkpoint(run / "new.ckpt")["global_step"] == checkpoint["global_step"]


def test_a_run_trains_where_nothing_can_be_synced(
    minigpt: Call, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    words = ("--data.path", text_file, "--run_dir", tmp_path / "run", "--trainer.max_steps", 4)
    outcome = minigpt("fit", *SMALL, *words)
    assert outcome.status == 0, outcome.err
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 4


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EIO, "correct this"),
     (errno.EROFS, "correct this"), (errno.ENOENT, "correct this")],
)  # fmt: skip
def test_only_a_full_disk_asks_for_room(number: int, remedy: str) -> None:
    assert f": {remedy}, then resume" in write_error("last.ckpt", OSError(number, os.strerror(number))).remedy


def test_a_checkpoint_callback_of_lightning_leaves_the_runs_last_checkpoint_alone(
    minigpt: Call, text_file: Path, tmp_path: Path
) -> None:
    """Both would write last.ckpt into the run directory; a run resumes from its own."""
    name, run = "--trainer.callbacks", tmp_path / "run"
    theirs = (name, "ModelCheckpoint", f"{name}.save_last", "true", f"{name}.monitor", "val/loss", f"{name}.dirpath")
    words = ("--data.path", text_file, "--run_dir", run, "--trainer.max_steps", 6)
    assert minigpt("fit", *SMALL, *words, *theirs, run).status == 0
    assert (run / "last-v1.ckpt").exists()
    assert read_checkpoint(run / "last.ckpt")["global_step"] == 6
    outcome = minigpt("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 8)
    assert outcome.status == 0, outcome.err
    assert read_checkpoint(run / "last.ckpt")["global_step"] == 8


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The complete file is synced, then renamed, then the directory is synced."""
    calls: list[str] = []
    replace, fsync = os.replace, os.fsync

    def recorded_fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append(f"fsync {Path(name).name} {os.fstat(descriptor).st_size if os.path.isfile(name) else ''}")
        fsync(descriptor)

    def recorded_replace(source: Any, target: Any) -> None:
        calls.append(f"replace {Path(source).name} {Path(target).name}")
        replace(source, target)

    checkpoint = read_checkpoint(run / "last.ckpt")
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    AtomicCheckpointIO().save_checkpoint(checkpoint, run / "last.ckpt")
    size = (run / "last.ckpt").stat().st_size
    assert calls == [f"fsync last.ckpt.writing {size}", "replace last.ckpt.writing last.ckpt", "fsync run "]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system too small for two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_reported_and_the_run_can_be_resumed(
    minigpt: Call, small_disk: Path, text_file: Path, tmp_path: Path
) -> None:
    args = ("fit", *SMALL, "--data.path", text_file)
    assert minigpt(*args, "--run_dir", tmp_path / "straight").status == 0
    for step, name in ((3, ""), (4, "/last.ckpt")):  # a row of metrics.csv is due, then a checkpoint
        run, full = small_disk / f"run{step}", small_disk / "full"
        with at_micro_batch(step, partial(fill, full)):
            outcome = minigpt(*args, "--run_dir", run)
        full.unlink()
        assert outcome.status == 2
        error = f"error: {run}{name} could not be written (No space left on device)"
        assert outcome.err.splitlines()[-1].startswith(error)
        assert outcome.err.count("error") == 1
        assert not list(run.glob("*.writing"))
        assert read_checkpoint(run / "last.ckpt")["global_step"] == 0
    shutil.move(run, tmp_path)  # where there is room
    assert minigpt("fit", "--run_dir", tmp_path / run.name, "--ckpt_path", "last").status == 0
    assert differences(tmp_path / "straight", tmp_path / run.name) == []


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


def test_a_limit_on_file_sizes_is_reported(minigpt: Call, tmp_path: Path, text_file: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        outcome = minigpt("fit", *SMALL, "--data.path", text_file, "--run_dir", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.status == 2
    assert "could not be written (File too large)" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_not_writable_is_reported(minigpt: Call, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "file").write_text("")
    for run in (Path("/proc/run"), tmp_path / "file", tmp_path / "file" / "run"):
        outcome = minigpt("fit", *SMALL, "--data.path", text_file, "--run_dir", run)
        assert outcome.status == 2
        assert outcome.err.startswith(f"error: --run_dir {run}: the directory is not writable (")
        assert outcome.err.count("\n") == 1


def test_a_checkpoint_that_is_older_than_some_options_keeps_its_model(minigpt: Call, tmp_path: Path) -> None:
    options = {"qk_norm": "false", "attention_every": "1"}
    args = [word for name, value in options.items() for word in (f"--model.{name}", value)]
    run = train_small(tmp_path, *args)
    checkpoint = torch.load(run / "last.ckpt")
    for name in options:
        del checkpoint["config"]["model"]["init_args"][name]
    torch.save(checkpoint, tmp_path / "older.ckpt")
    now, older = (load_checkpoint(path).model.state_dict() for path in (run / "last.ckpt", tmp_path / "older.ckpt"))
    assert now.keys() == older.keys()
    assert all(torch.equal(now[name], older[name]) for name in now)
    shutil.copy(tmp_path / "older.ckpt", run / "last.ckpt")
    outcome = minigpt("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 20)
    assert outcome.status == 0, outcome.err


def test_a_checkpoint_holds_plain_values_only(run: Path) -> None:
    """It loads with weights_only, and the only path in it is that of the text."""
    checkpoint = torch.load(run / "best.ckpt", weights_only=True)
    paths = [value for value in leaves(checkpoint) if isinstance(value, str) and str(run.parents[1]) in value]
    assert [path for path in paths if not path.endswith("text.txt")] == []


def leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from leaves(value)
    else:
        yield node
