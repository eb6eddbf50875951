"""Checkpoint files: written whole or not at all, found, vetted and read without executing anything in them.

What goes into a checkpoint is said by Lightning, `callbacks` and `data`; when one is written, by `callbacks`.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from minigpt_pl.errors import InputError

BEST, LAST = "best.ckpt", "last.ckpt"
TEMPORARY = ".writing"
NEEDED = {"state_dict", "settings", "vocab_size", "global_step", "digest", "TextDataModule", "optimizer_states", "loops"}


def tensors(node: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dicts and lists, with its place, in a fixed order."""
    if isinstance(node, torch.Tensor):
        yield path, node
    elif isinstance(node, dict):
        for name in sorted(node, key=str):
            yield from tensors(node[name], f"{path}/{name}")
    elif isinstance(node, (list, tuple)):
        for place, value in enumerate(node):
            yield from tensors(value, f"{path}/{place}")


def digest(checkpoint: dict[str, Any]) -> str:
    """A hash over the tensors of the weights and of the optimizer's state: names, types, shapes and every byte."""
    result = hashlib.blake2b(digest_size=32)
    for name, tensor in tensors({key: checkpoint[key] for key in ("state_dict", "optimizer_states")}):
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
        checkpoint["digest"] = digest(checkpoint)
        temporary = path.with_name(f"{path.name}{TEMPORARY}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            raise InputError(
                f"{path} could not be written ({reason}): free space or choose another --run_dir; earlier files are whole"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        prepared, self.prepared = self.prepared, None
        return read_checkpoint(path) if prepared is None else prepared


def sync_folder(folder: Path) -> None:
    """Makes a rename in a folder durable; a no-op where folders cannot be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holds_run(folder: Path) -> bool:
    return (folder / BEST).exists() or (folder / LAST).exists()


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
        raise InputError(f"--ckpt_path {said} needs --run_dir: give both, or the checkpoint's file")
    path = Path(run_dir).expanduser() / (LAST if said == "last" else BEST)
    if not path.is_file():
        raise InputError(f"--ckpt_path {said}: there is no {path}" + offer(path))
    return path


def offer(path: Path) -> str:
    """The next best choice beside a checkpoint that cannot be used, as the end of a message."""
    for name in (LAST, BEST):
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
        raise InputError(f"the checkpoint {path} is a directory: name a file in it{offer(path / 'x').replace(': give', ', or give')}")
    if not path.is_file():
        raise InputError(f"the checkpoint {path} does not exist" + offer(path))
    forced = os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path} is not a whole checkpoint ({path.stat().st_size} bytes)" + offer(path))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except PermissionError:
        raise InputError(f"the checkpoint {path} cannot be read: permission denied") from None
    except Exception as error:  # torch raises a dozen kinds on a damaged or hostile file; none is executed
        raise InputError(f"{path} is damaged or not a checkpoint of plain values ({reason(error)})" + offer(path)) from None
    finally:
        if forced is not None:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = forced
    if not isinstance(checkpoint, dict) or not NEEDED <= checkpoint.keys():
        raise InputError(f"{path} is not a checkpoint that minigpt wrote" + offer(path))
    if digest(checkpoint) != checkpoint["digest"]:
        raise InputError(f"{path} is damaged: its weights or optimizer states differ from their digest" + offer(path))
    return checkpoint


def reason(error: Exception) -> str:
    """The first telling words of torch's message."""
    text = str(error).replace("\n", " ")
    if found := re.search(r"Unsupported (?:global|class|operand)[^.]*?: ?(?:GLOBAL )?([\w.]+)", text):
        return f"it names {found[1]}"
    return f"{type(error).__name__}: {text[:80]}"


def check_sizes_fit(checkpoint: dict[str, Any]) -> None:
    """Compares the sizes that a checkpoint's settings claim with its tensors, before any model is built.

    Raises:
        InputError: If they differ.
    """
    weights, claimed = checkpoint["state_dict"], checkpoint["settings"]["model"]["init_args"]
    table = weights.get("net.token_embedding.weight")
    found = {
        "n_layer": len({name.split(".")[2] for name in weights if name.startswith("net.blocks.")}),
        "n_embd": table.shape[1] if table is not None else 0,
    }
    for name, value in {**claimed, "vocab_size": checkpoint["vocab_size"]}.items():
        if name == "vocab_size" and table is not None:
            found[name] = table.shape[0]
        if name == "n_experts" and value:
            experts = weights.get("net.blocks.0.feed_forward.gate_up")
            found[name] = experts.shape[0] if experts is not None else 0
        if name == "block_size" and (positions := weights.get("net.position_embedding.weight")) is not None:
            found[name] = positions.shape[0]
        if name == "ffn_mult":
            gate_up = [w for n, w in weights.items() if n.startswith("net.blocks.0.feed_forward.gate_up")]
            width = gate_up[0].shape[-2] // 2 if gate_up else 0
            found[name] = value if int(value * found["n_embd"]) == width else width / max(1, found["n_embd"])
        if name in found and value != found[name]:
            raise InputError(f"the checkpoint claims model.{name} {value}, but its weights have {found[name]}: it is not whole")


def clean_leftovers(folder: Path) -> None:
    """Removes what a writer that died has left half-written."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        leftover.unlink()


def whole_steps(loops: dict[str, Any], batches: int) -> None:
    """Rewrites the saved progress of Lightning's loops, in place, to: `batches` micro-batches done, no check under way.

    Lightning saves what it was in the middle of, and acts on it after a resume; we only save where a step, and the
    check that belongs to it, are complete.
    """
    fit = loops["fit_loop"]
    done = dict.fromkeys(("ready", "started", "processed", "completed"), batches)
    fit["epoch_loop.batch_progress"].update(total=dict(done), current=dict(done), is_last_batch=False)
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0} if batches else dict.fromkeys(done, 0)
    fit["epoch_progress"].update(total=dict(begun), current=dict(begun))
    none = dict.fromkeys(done, 0)
    fit["epoch_loop.val_loop.batch_progress"].update(total=dict(none), current=dict(none), is_last_batch=False)
