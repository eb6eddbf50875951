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

from minigpt_pl import signals
from minigpt_pl.checkpoint import LAST, holds_run
from minigpt_pl.errors import InputError, is_first_process, say
from minigpt_pl.files import CONFIG, METRICS, SAMPLES, SUMMARY, clean_leftovers

OURS = (CONFIG, METRICS, SUMMARY, SAMPLES, "wandb")


def choose(said: str, checkpoint: Path | None, model: str) -> tuple[Path, bool]:
    """The run directory, and whether the run there goes on.

    Args:
        said: --run_dir, or "".
        checkpoint: What the run starts from, or None.
        model: The model's class, for the name of a new directory.

    Raises:
        InputError: If the directory holds another run, or a branch has no directory of its own.
    """
    first = is_first_process()
    if not first and "MINIGPT_RUN_DIR" in os.environ:  # the clock has moved on, and the directory may hold a run by now
        return Path(os.environ["MINIGPT_RUN_DIR"]), os.environ["MINIGPT_GOES_ON"] == "1"
    goes_on = checkpoint is not None and checkpoint.name == LAST
    if goes_on and said and checkpoint:
        goes_on = Path(said).expanduser().resolve() == checkpoint.parent.resolve()
    if checkpoint and not goes_on and not said:
        raise InputError(
            f"--ckpt_path {checkpoint} is not where a run stopped: give its branch a place with --run_dir NEW, "
            "or go on from last.ckpt"
        )
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{model}"
    run_dir = checkpoint.parent if goes_on and checkpoint else Path(said).expanduser() if said else Path("runs", name)
    if not (said or goes_on) and (not first or has_siblings()):
        raise InputError("several processes were started, each with its own clock: give --run_dir")
    if not first:
        return run_dir, goes_on
    refuse_other_run(run_dir, goes_on)
    os.environ["MINIGPT_RUN_DIR"], os.environ["MINIGPT_GOES_ON"] = str(run_dir), str(int(goes_on))
    return run_dir, goes_on


def has_siblings() -> bool:
    """Whether torchrun or SLURM started others beside this process; none of them could tell the rest a time."""
    counts = {"TORCHELASTIC_RUN_ID": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}
    return any(mark in os.environ and int(os.environ.get(count) or 1) > 1 for mark, count in counts.items())


def refuse_other_run(run_dir: Path, goes_on: bool) -> None:
    if holds_run(run_dir) and not goes_on:
        raise InputError(
            f"--run_dir {run_dir} holds a run: go on with it by --ckpt_path last, or choose another --run_dir"
        )


@contextmanager
def claimed(run_dir: Path, goes_on: bool) -> Iterator[None]:
    """Makes the directory and keeps other processes out of it; in the end, what is half-made goes.

    Raises:
        InputError: If it cannot be written or another process trains in it.
    """
    if not is_first_process():
        yield
        return
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    lock = FileLock(run_dir / ".lock")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"--run_dir {run_dir}: another process trains there; wait for it, or choose another --run_dir"
        ) from None
    except OSError as error:
        raise InputError(f"--run_dir {run_dir} cannot be written ({error.strerror}): choose another") from None

    def tidy() -> None:
        with suppress(OSError):
            clean_leftovers(run_dir)
            if not holds_run(run_dir):
                for path in (run_dir / name for name in OURS):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: nobody waits for it
            for folder in made if not holds_run(run_dir) else ():
                folder.rmdir()  # stops at the first that is not empty

    signals.before_leaving.append(tidy)
    try:
        refuse_other_run(run_dir, goes_on)  # another process may have been faster
        clean_leftovers(run_dir)
        if not goes_on:
            move_aside(run_dir)
        yield
    finally:
        tidy()
        lock.release()
        signals.before_leaving.remove(tidy)


def move_aside(run_dir: Path) -> None:
    """Files of a start that died before its first checkpoint do not mix with those of the next."""
    if left := [run_dir / name for name in OURS if (run_dir / name).exists()]:
        aside = run_dir / f"aside-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        aside.mkdir()
        for path in left:
            shutil.move(path, aside / path.name)
        say(f"{run_dir} had files of a start that died early: moved to {aside}")
