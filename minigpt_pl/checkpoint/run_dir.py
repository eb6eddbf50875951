"""A run's directory: chosen, claimed by one process, and left as it should be by a start that failed.

What stands in the files is the matter of those who write them.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from minigpt_pl.checkpoint.io import LAST_CKPT, holds_run
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.atomic_io import CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE, remove_temp_files
from minigpt_pl.runtime.errors import UserError, is_rank_zero, rank_zero_print

RUN_FILES = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, SAMPLES_FILE, "wandb")


def resolve_run_dir(said: str, checkpoint: Path | None, model: str) -> tuple[Path, bool]:
    """The run directory, and whether the run there goes on.

    Args:
        said: --run_dir, or "".
        checkpoint: What the run starts from, or None.
        model: The model's class, for the name of a new directory.

    Raises:
        InputError: If the directory holds another run, or a branch has no directory of its own.
    """
    first = is_rank_zero()
    if not first and "MINIGPT_RUN_DIR" in os.environ:  # the clock has moved on, and the directory may hold a run by now
        return Path(os.environ["MINIGPT_RUN_DIR"]), os.environ["MINIGPT_RESUMING"] == "1"
    resuming = checkpoint is not None and checkpoint.name == LAST_CKPT
    if resuming and said and checkpoint:
        resuming = Path(said).expanduser().resolve() == checkpoint.parent.resolve()
    if checkpoint and not resuming and not said:
        raise UserError(
            f"--ckpt_path {checkpoint} is not where a run stopped: give its branch a place with --run_dir NEW, "
            "or go on from last.ckpt"
        )
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{model}"
    run_dir = checkpoint.parent if resuming and checkpoint else Path(said).expanduser() if said else Path("runs", name)
    if not (said or resuming) and (not first or has_peer_processes()):
        raise UserError("several processes were started, each with its own clock: give --run_dir")
    if not first:
        return run_dir, resuming
    check_run_dir_free(run_dir, resuming)
    os.environ["MINIGPT_RUN_DIR"], os.environ["MINIGPT_RESUMING"] = str(run_dir), str(int(resuming))
    return run_dir, resuming


def has_peer_processes() -> bool:
    """Whether torchrun or SLURM started others beside this process; none of them could tell the rest a time."""
    counts = {"TORCHELASTIC_RUN_ID": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}
    return any(mark in os.environ and int(os.environ.get(count) or 1) > 1 for mark, count in counts.items())


def check_run_dir_free(run_dir: Path, resuming: bool) -> None:
    if holds_run(run_dir) and not resuming:
        raise UserError(
            f"--run_dir {run_dir} holds a run: go on with it by --ckpt_path last, or choose another --run_dir"
        )


@contextmanager
def lock_run_dir(run_dir: Path, resuming: bool) -> Iterator[None]:
    """Makes the directory and keeps other processes out of it; in the end, what is half-made goes.

    Raises:
        InputError: If it cannot be written or another process trains in it.
    """
    if not is_rank_zero():
        yield
        return
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    lock = FileLock(run_dir / ".lock")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--run_dir {run_dir}: another process trains there; wait for it, or choose another --run_dir"
        ) from None
    except OSError as error:
        raise UserError(f"--run_dir {run_dir} cannot be written ({error.strerror}): choose another") from None

    def tidy() -> None:
        with suppress(OSError):
            remove_temp_files(run_dir)
            if not holds_run(run_dir):
                for path in (run_dir / name for name in RUN_FILES):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: nobody waits for it
            for folder in made if not holds_run(run_dir) else ():
                folder.rmdir()  # stops at the first that is not empty

    signals.exit_hooks.append(tidy)
    try:
        check_run_dir_free(run_dir, resuming)  # another process may have been faster
        remove_temp_files(run_dir)
        if not resuming:
            move_leftovers_aside(run_dir)
        yield
    finally:
        tidy()
        lock.release()
        signals.exit_hooks.remove(tidy)


def move_leftovers_aside(run_dir: Path) -> None:
    """Files of a start that died before its first checkpoint do not mix with those of the next."""
    if left := [run_dir / name for name in RUN_FILES if (run_dir / name).exists()]:
        aside = run_dir / f"aside-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        aside.mkdir()
        for path in left:
            shutil.move(path, aside / path.name)
        rank_zero_print(f"{run_dir} had files of a start that died early: moved to {aside}")
