"""Checkpoint files: written completely or not at all, and read without executing anything in them.

What a checkpoint's configuration may contain is in `validation`; when one is written, in `training.checkpointing`.
"""

import errno
import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from minigpt_pl.runtime.atomic_io import TEMP_SUFFIX
from minigpt_pl.runtime.errors import UserError, one_line

BEST_CKPT, LAST_CKPT = "best.ckpt", "last.ckpt"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, None}
"""None: torch does not say why it could not write, and this is the usual reason."""
CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
"""What a file system answers that does not know fsync, as some of networks and containers: nothing has failed."""
MODEL_KEYS = {"state_dict", "global_step", "config", "vocab_size"}
"""What a checkpoint of any Lightning callback has, if it holds a LanguageModel."""
RUN_KEYS = {*MODEL_KEYS, "optimizer_states", "callbacks", "loops", "digest", "wandb_id"}
"""What a checkpoint of `minigpt fit` has."""
TRAINED_WEIGHTS = "trained_weights"
"""Of a run that averages its weights, whose state_dict is the average: what it resumes from."""
TEXT_KEYS = {"tokenizer", "tokenizer_sha256", "text_path", "text_sha256"}
"""Of the state of a TextDataModule. Lightning stores it under the name of its class, which may be the user's own."""


def iter_tensors(node: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dicts and lists with its path, in a fixed order."""
    if isinstance(node, torch.Tensor):
        yield path, node
    elif isinstance(node, dict):
        for name in sorted(node, key=str):
            yield from iter_tensors(node[name], f"{path}/{name}")
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from iter_tensors(value, f"{path}/{index}")


def tensor_digest(checkpoint: dict[str, Any]) -> str:
    """A hash of the weights' and the optimizer states' tensors: names, types, shapes and every byte."""
    covered = ("state_dict", "optimizer_states", TRAINED_WEIGHTS)
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in iter_tensors({key: checkpoint.get(key) for key in covered}):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file in the same directory, then renames it. Lightning's own goes through $TMPDIR."""

    prepared: dict[str, Any] | None = None
    """A checkpoint for the next load, which then reads no file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        checkpoint["digest"] = tensor_digest(checkpoint)
        temporary = path.with_name(f"{path.name}{TEMP_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                fsync_file(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            with suppress(OSError):
                temporary.unlink()
            raise write_error(path, error) from error
        fsync_dir(path.parent)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        prepared, self.prepared = self.prepared, None
        return read_checkpoint(path) if prepared is None else prepared


def write_error(path: Any, error: BaseException) -> UserError:
    """What to tell the user when a file of a run could not be written."""
    cause = error if isinstance(error, OSError) or error.__context__ is None else error.__context__
    reason = getattr(cause, "strerror", None) or one_line(error)
    way = "make room" if getattr(cause, "errno", None) in DISK_FULL else "correct this"
    remedy = f"the files written before are complete: {way}, then resume the run"
    return UserError(f"{path} could not be written ({reason})", remedy=remedy)


def fsync_file(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    if sys.platform == "darwin":  # fsync stops at the disk's own cache there
        import fcntl

        with suppress(OSError):  # a disk without it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def fsync_dir(directory: Path) -> None:
    """Makes a rename in a directory durable, on systems that can."""
    with suppress(OSError):  # Windows cannot open a directory, and some file systems cannot sync one
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def suggest_checkpoint(path: Path) -> str:
    """The remedy for a checkpoint that cannot be used."""
    for other in (path.parent / LAST_CKPT, path.parent / BEST_CKPT):
        if other != path and other.is_file():
            return f"try {other}"
    return "name a checkpoint that minigpt wrote"


def read_checkpoint(path: Any) -> dict[str, Any]:
    """A checkpoint with its tensors on the CPU. Its configuration is not validated yet.

    The state of the text is in "TextDataModule", whatever the class of the data module.

    Raises:
        UserError: If it is missing, damaged, from another program, or holds anything but plain values and tensors.
    """
    path = Path(path)

    def error(problem: str, remedy: str = "") -> UserError:
        return UserError(problem, option="ckpt_path", value=path, remedy=remedy or suggest_checkpoint(path))

    if path.is_dir():
        raise error("it is a directory", f"name a file in it, such as {path / LAST_CKPT}")
    if not path.is_file():
        raise error("the file does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise error(f"the file is not a complete checkpoint ({path.stat().st_size} bytes)")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict):
            states = [value for value in checkpoint.values() if isinstance(value, dict) and value.keys() >= TEXT_KEYS]
            checkpoint = ({"TextDataModule": states[0]} if states else {}) | checkpoint
        keys = checkpoint.keys() if isinstance(checkpoint, dict) else set()
        complete = all(is_plain(tensor) for _, tensor in iter_tensors(checkpoint))
        complete = complete and ("digest" not in keys or tensor_digest(checkpoint) == checkpoint["digest"])
    except UserError:
        raise
    except PermissionError:
        raise error("it cannot be read (Permission denied)") from None
    except Exception as exception:  # torch raises many types for a damaged or hostile file; it executes nothing
        reason = load_error_cause(exception)
        raise error(f"the file is damaged, or not a checkpoint of plain values ({reason})") from None
    if keys >= RUN_KEYS - {"config"} | {"settings"}:
        raise error("minigpt_pl 0.1 wrote it, and this version cannot read it", "train the model again")
    if not keys >= MODEL_KEYS:
        raise error("it is not a checkpoint of a minigpt model")
    if not complete:
        raise error("the file is damaged: its weights or optimizer states differ from their digest")
    if isinstance(checkpoint["config"], dict):
        checkpoint["config"] = with_newer_options(checkpoint["config"])
    return checkpoint


def with_newer_options(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration, for a ModernLM with the options that are newer than it, as its model was trained.

    Their defaults are others, with which the model would not have the stored weights.
    """
    args = model.get("init_args") if isinstance(model := config.get("model"), dict) else None
    if not isinstance(args, dict) or "conv_kernel_size" not in args:
        return config
    return config | {"model": config["model"] | {"init_args": {"qk_norm": False, "attention_every": 1} | args}}


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether every element is in the file: torch rebuilds a tensor of any size from one repeated number."""
    stored = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return stored and tensor.untyped_storage().nbytes() >= tensor.nbytes


def load_error_cause(error: Exception) -> str:
    """The relevant part of torch's message."""
    text = str(error).replace("\n", " ")
    if match := re.search(r"Unsupported (?:global|class|operand)[^.]*?: ?(?:GLOBAL )?([\w.]+)", text):
        return f"it contains {match[1]}"
    return f"{type(error).__name__}: {text[:80]}"
