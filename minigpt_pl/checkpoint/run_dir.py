"""The directory of a run: chosen, locked by one process, and cleaned up after a start that failed.

The contents of its files belong to those who write them.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, LeaseCompromise, SoftFileLease, Timeout

from minigpt_pl.checkpoint.io import BEST_CKPT, LAST_CKPT, suggest_checkpoint
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.atomic_io import (
    CONFIG_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
    TENSORBOARD_DIR,
    remove_temp_files,
)
from minigpt_pl.runtime.errors import UserError, is_rank_zero, rank_zero_print
from minigpt_pl.runtime.paths import expand_home

RUN_FILES = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, SAMPLES_FILE, TENSORBOARD_DIR, "wandb")
LOCKED = "another process trains in it"
LOCK_FILE, LEASE_FILE = ".lock", ".lease"
LEASE_SECONDS = 30.0  # a lease that nobody refreshes for so long is that of a host which has died


class RunDir(NamedTuple):
    """The directory of a run, and whether the run in it is resumed."""

    path: Path
    resuming: bool

    def holds_run(self) -> bool:
        return (self.path / BEST_CKPT).exists() or (self.path / LAST_CKPT).exists()

    def error(self, problem: str, remedy: str = "") -> UserError:
        return UserError(problem, option="run_dir", value=self.path, remedy=f"{remedy}use another --run_dir")

    def check_free(self) -> None:
        """Raises a UserError if a new run would overwrite another one."""
        if self.holds_run() and not self.resuming:
            raise self.error("the directory holds a run", "resume it with --ckpt_path last, or ")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the directory and keeps other processes out of it; at the end removes what is unfinished.

        Two locks do this. The kernel's (flock) is exact: it ends with the process, however that ends. But some file
        systems that hosts share keep it to one host. For these the holder also refreshes a lease, a file that another
        host can watch. Where the kernel's lock is shared, nobody ever waits for the lease of a living process.
        """
        if not is_rank_zero():
            yield
            return
        created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        lock = FileLock(self.path / LOCK_FILE)
        lease = SoftFileLease(self.path / LEASE_FILE, lease_duration=LEASE_SECONDS, on_compromise=self._end_if_taken)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            lease.acquire(timeout=1.5 * LEASE_SECONDS, poll_interval=0.2)
        except Timeout:
            lock.release()
            raise self.error(LOCKED, "wait for it to end, or ") from None
        except OSError as error:
            lock.release()
            raise self.error(f"the directory is not writable ({error.strerror})") from None
        clean_up = partial(self._clean_up, created)
        signals.exit_hooks.append(clean_up)
        try:
            self.check_free()  # again: another process may have been faster
            remove_temp_files(self.path)
            if not self.resuming:
                self._move_leftovers()
            yield
        finally:
            lease.release()
            clean_up()
            lock.release()
            signals.exit_hooks.remove(clean_up)

    def _clean_up(self, created: list[Path]) -> None:
        with suppress(OSError):
            remove_temp_files(self.path)
            if not self.holds_run():
                for path in (self.path / name for name in RUN_FILES):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            for name in (LEASE_FILE, LOCK_FILE):  # while the lock is held, as nobody waits for it
                (self.path / name).unlink(missing_ok=True)
            for folder in created:
                folder.rmdir()  # stops at the first one that is not empty

    def _end_if_taken(self, loss: LeaseCompromise) -> None:
        """Ends a process that stood still for longer than its lease, if another host trains here since."""
        if loss.reason == "owner-changed":
            rank_zero_print(f"error: {self.error('another host has taken it over while this process stood still')}")
            os._exit(2)  # without a checkpoint, which would replace a newer one

    def _move_leftovers(self) -> None:
        """Keeps files of a start that died before its first checkpoint out of the new run."""
        if leftovers := [self.path / name for name in RUN_FILES if (self.path / name).exists()]:
            aside = set_aside(leftovers)
            rank_zero_print(f"{self.path} had files of a start that failed early: moved to {aside}")


def set_aside(paths: list[Path]) -> Path:
    """Moves files of one run directory into a new directory in it, and returns that."""
    aside = paths[0].parent / f"aside-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    aside.mkdir()
    for path in paths:
        shutil.move(path, aside / path.name)
    return aside


def resolve_run_dir(run_dir: str, checkpoint: Path | None, model: str) -> RunDir:
    """The directory of a run of `fit`, from --run_dir or "", the checkpoint to start from, and the model's class.

    Raises:
        UserError: If the directory holds another run, or a fork has no directory.
    """
    path = expand_home(run_dir, "run_dir") if run_dir else None
    resuming = checkpoint is not None and checkpoint.name == LAST_CKPT
    if checkpoint and path:
        resuming = resuming and path.resolve() == checkpoint.parent.resolve()
    elif checkpoint and not resuming:
        remedy = "start a fork with --run_dir NEW, or resume from last.ckpt"
        raise UserError("a run resumes from last.ckpt only", option="ckpt_path", value=checkpoint, remedy=remedy)
    result = RunDir(checkpoint.parent if checkpoint and resuming else path or _new_path(model), resuming)
    if is_rank_zero():  # for others the directory may hold the run by now
        result.check_free()
    return result


def _new_path(model: str) -> Path:
    """A path by time and model. Processes that Lightning starts inherit the first one's, as the time has moved on."""
    if is_rank_zero() and not has_peer_processes():
        os.environ["MINIGPT_RUN_DIR"] = str(Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}-{model}"))
    elif is_rank_zero() or "MINIGPT_RUN_DIR" not in os.environ:
        raise UserError("several processes were started, each with its own clock", remedy="use --run_dir DIR")
    return Path(os.environ["MINIGPT_RUN_DIR"])


def has_peer_processes() -> bool:
    """Whether torchrun or SLURM started other processes, which inherit nothing from this one."""
    counts = {"TORCHELASTIC_RUN_ID": "WORLD_SIZE", "SLURM_PROCID": "SLURM_NTASKS"}
    return any(mark in os.environ and int(os.environ.get(count) or 1) > 1 for mark, count in counts.items())


def find_checkpoint(ckpt_path: str, run_dir: str) -> Path:
    """The file that --ckpt_path names; `last` and `best` must exist in --run_dir."""
    if ckpt_path not in ("last", "best"):
        return expand_home(ckpt_path, "ckpt_path")
    if not run_dir:
        remedy = "use both, or name the checkpoint's file"
        raise UserError("it needs --run_dir", option="ckpt_path", value=ckpt_path, remedy=remedy)
    path = expand_home(run_dir, "run_dir") / (LAST_CKPT if ckpt_path == "last" else BEST_CKPT)
    if not path.is_file():
        problem = f"there is no {path}"
        raise UserError(problem, option="ckpt_path", value=ckpt_path, remedy=suggest_checkpoint(path))
    return path
