"""A run's directory: chosen, claimed by one process, and left as it should be by a start that failed.

What stands in the files is the matter of those who write them.
"""

import os
import secrets
import shutil
import sys
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from minigpt_pl import signals
from minigpt_pl.checkpoint import clean_leftovers, holds_run
from minigpt_pl.errors import InputError

OURS = ("config.yaml", "metrics.csv", "summary.json", "samples.txt", "wandb")


def choose(said: str, checkpoint: Path | None, model: str) -> tuple[Path, bool]:
    """The run directory, and whether the run there goes on.

    Args:
        said: --run_dir, or "".
        checkpoint: What the run starts from, or None.
        model: The model's class, for the name of a new directory.

    Raises:
        InputError: If the directory holds another run, or a branch has no directory of its own.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # a process that the first one started: the clock has moved on
        return Path(os.environ["MINIGPT_RUN_DIR"]), os.environ["MINIGPT_GOES_ON"] == "1"
    home = checkpoint.resolve().parent if checkpoint else None
    goes_on = bool(checkpoint) and checkpoint.name == "last.ckpt" and (not said or Path(said).resolve() == home)  # type: ignore[union-attr]
    if checkpoint and not goes_on and not said:
        raise InputError(
            f"--ckpt_path {checkpoint} is not where a run stopped: give its branch a place with --run_dir NEW, "
            "or go on from last.ckpt"
        )
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{model}"
    run_dir = checkpoint.parent if goes_on and checkpoint else Path(said).expanduser() if said else Path("runs", name)
    if holds_run(run_dir) and not goes_on:
        raise InputError(
            f"--run_dir {run_dir} holds a run: go on with it by --ckpt_path last, or choose another --run_dir"
        )
    os.environ["MINIGPT_RUN_DIR"], os.environ["MINIGPT_GOES_ON"] = str(run_dir), str(int(goes_on))
    return run_dir, goes_on


def claim(run_dir: Path, goes_on: bool) -> FileLock:
    """Makes the directory, locks it for this process, and clears away what a start that died has left.

    Raises:
        InputError: If it cannot be written or another process trains in it.
    """
    existed = run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / ".lock")
        lock.acquire(timeout=0)
        probe = run_dir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except Timeout:
        raise InputError(f"--run_dir {run_dir}: another process trains there; wait for it, or choose another --run_dir") from None
    except OSError as error:
        raise InputError(f"--run_dir {run_dir} cannot be written ({error.strerror}): choose another") from None
    clean_leftovers(run_dir)
    if not goes_on and (left := [run_dir / name for name in OURS if (run_dir / name).exists()]):
        aside = run_dir / f"aside-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        aside.mkdir()
        for path in left:
            shutil.move(path, aside / path.name)
        print(f"{run_dir} had files of a start that died early: moved to {aside}", file=sys.stderr)

    def leave_nothing_half_made(number: int) -> None:
        if not holds_run(run_dir):
            release(lock)
            for name in OURS:
                path = run_dir / name
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            clean_leftovers(run_dir)
            if not existed and not any(run_dir.iterdir()):
                run_dir.rmdir()

    signals.before_leaving.append(leave_nothing_half_made)
    return lock


def release(lock: FileLock) -> None:
    """Lets others write into the directory."""
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
