"""Checkpoint files: written whole or not at all, found, vetted and read without executing anything in them.

What goes into a checkpoint is said by Lightning, `callbacks` and `data`; when one is written, by `saving`.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from minigpt_pl.runtime.atomic_io import TEMP_SUFFIX
from minigpt_pl.runtime.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BEST_CKPT, LAST_CKPT = "best.ckpt", "last.ckpt"
WRITE_FAILED_REMEDY = "what was saved before is whole; make room, then go on from it"
REQUIRED_KEYS = {  # of a checkpoint
    "state_dict", "optimizer_states", "callbacks", "loops", "global_step", "digest", "settings", "vocab_size",
    "wandb_id", "TextDataModule",
}  # fmt: skip


def iter_tensors(node: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dicts and lists, with its place, in a fixed order."""
    if isinstance(node, torch.Tensor):
        yield path, node
    elif isinstance(node, dict):
        for name in sorted(node, key=str):
            yield from iter_tensors(node[name], f"{path}/{name}")
    elif isinstance(node, (list, tuple)):
        for place, value in enumerate(node):
            yield from iter_tensors(value, f"{path}/{place}")


def tensor_digest(checkpoint: dict[str, Any]) -> str:
    """A hash over the tensors of the weights and of the optimizer's state: names, types, shapes and every byte."""
    result = hashlib.blake2b(digest_size=32)
    for name, tensor in iter_tensors({key: checkpoint.get(key) for key in ("state_dict", "optimizer_states")}):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs file and folder, then renames. Lightning's own goes through $TMPDIR.

    Attributes:
        prepared: A checkpoint that is already read, for the next load.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prepared: dict[str, Any] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        checkpoint["digest"] = tensor_digest(checkpoint)
        temporary = path.with_name(f"{path.name}{TEMP_SUFFIX}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                fsync_file(file.fileno())
            os.replace(temporary, path)
            fsync_dir(path.parent)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            with suppress(OSError):
                temporary.unlink()
            raise UserError(f"{path} could not be written ({error_cause(error)}): {WRITE_FAILED_REMEDY}") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        prepared, self.prepared = self.prepared, None
        return read_checkpoint(path) if prepared is None else prepared


def error_cause(error: BaseException) -> str:
    """The cause of a failed write in the system's words."""
    cause = error if isinstance(error, OSError) else error.__context__
    return getattr(cause, "strerror", None) or str(error).split("\n")[0]


def fsync_file(descriptor: int) -> None:
    """Returns when a file is on the disk; on macOS that is more than fsync, which stops at the disk's own cache."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined]
    except (AttributeError, OSError):  # not macOS, or a disk that cannot
        os.fsync(descriptor)


def fsync_dir(folder: Path) -> None:
    """Makes a rename in a folder durable; nothing to do where folders cannot be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holds_run(folder: Path) -> bool:
    return (folder / BEST_CKPT).exists() or (folder / LAST_CKPT).exists()


def find_checkpoint(said: str, run_dir: str) -> Path:
    """The file that --ckpt_path means.

    Args:
        said: "last" or "best", in the run directory, or a file.
        run_dir: The run directory, or "".

    Raises:
        InputError: If there is none.
    """
    if said not in ("last", "best"):
        return Path(said).expanduser()
    if not run_dir:
        raise UserError(f"--ckpt_path {said} needs --run_dir: give both, or the checkpoint's file")
    path = Path(run_dir).expanduser() / (LAST_CKPT if said == "last" else BEST_CKPT)
    if not path.is_file():
        raise UserError(f"--ckpt_path {said}: there is no {path}" + suggest_checkpoint(path))
    return path


def suggest_checkpoint(path: Path) -> str:
    """The next best choice beside a checkpoint that cannot be used, as the end of a message."""
    for name in (LAST_CKPT, BEST_CKPT):
        other = path.parent / name
        if other != path and other.is_file():
            return f"; {other} is there: try it"
    return ": give a checkpoint that minigpt wrote"


def read_checkpoint(path: Any) -> dict[str, Any]:
    """A vetted checkpoint; its tensors lie on the CPU.

    Raises:
        InputError: If it is missing, damaged, not one of ours, or holds anything but plain values and tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"the checkpoint {path} is a directory: name a file in it, such as {path / LAST_CKPT}")
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist" + suggest_checkpoint(path))
    forced = os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is not a whole checkpoint ({path.stat().st_size} bytes)" + suggest_checkpoint(path)
            )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(checkpoint, dict) and checkpoint.keys() >= REQUIRED_KEYS
        padded = [name for name, tensor in iter_tensors(checkpoint) if not is_plain(tensor)]
        whole = ours and not padded and tensor_digest(checkpoint) == checkpoint["digest"]
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"the checkpoint {path} cannot be read: permission denied") from None
    except Exception as error:  # torch raises a dozen kinds on a damaged or hostile file; none is executed
        raise UserError(
            f"{path} is damaged or not a checkpoint of plain values ({load_error_cause(error)})"
            + suggest_checkpoint(path)
        ) from None
    finally:
        if forced is not None:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = forced
    if not ours:
        raise UserError(f"{path} is not a checkpoint that minigpt wrote" + suggest_checkpoint(path))
    if not whole:
        raise UserError(
            f"{path} is damaged: its weights or optimizer states differ from their digest" + suggest_checkpoint(path)
        )
    return checkpoint


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the file has every element of it: torch rebuilds a tensor of any size from one repeated number."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )


def load_error_cause(error: Exception) -> str:
    """The first telling words of torch's message."""
    text = str(error).replace("\n", " ")
    if found := re.search(r"Unsupported (?:global|class|operand)[^.]*?: ?(?:GLOBAL )?([\w.]+)", text):
        return f"it names {found[1]}"
    return f"{type(error).__name__}: {text[:80]}"


def loop_state(steps: int, batches: int, checked: bool) -> dict[str, Any]:
    """What Lightning's loops are to restore: so many steps and micro-batches done, and no check under way.

    Lightning saves what it was in the midst of, and acts on it after a resume; we only save where a step, and the check
    that belongs to it, are complete.

    Args:
        steps: Optimizer steps.
        batches: Micro-batches.
        checked: Whether a check lies at this step: Lightning then counts a step for its loggers as it skips it.
    """

    def both(ready: int, started: int, completed: int) -> dict[str, dict[str, int]]:
        count = {"ready": ready, "started": started, "processed": completed, "completed": completed}
        return {"total": dict(count), "current": dict(count)}

    return {
        "fit_loop": {
            "epoch_progress": both(1, 1, 0) if steps else both(0, 0, 0),
            "epoch_loop.state_dict": {"_batches_that_stepped": steps - checked},
            "epoch_loop.batch_progress": both(batches, batches, batches) | {"is_last_batch": False},
            "epoch_loop.automatic_optimization.optim_progress": {
                "optimizer": {"step": both(steps, steps, steps), "zero_grad": both(steps, steps, steps)}
            },
        }
    }
