"""A run of a study as a task: the process that trains it, and the measurement of its result. It runs on a worker.

Which workers there are is in `cluster`; what becomes of the result in `runner`.
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

import torch
from distributed import get_client, get_worker

from minigpt_pl.checkpoint.run_dir import LOCKED
from minigpt_pl.experiments.results import Result, TokenNLL, measure
from minigpt_pl.experiments.spec import Run
from minigpt_pl.runtime.errors import UserError

POLL_SECONDS = 0.5
LOCK_PATIENCE = 600.0  # seconds: as long a process whose worker has died may take to end its step and save
LOCK_PAUSE = 2.0
OF_ONE_RUN = ("WANDB_NAME", "WANDB_RUN_ID")  # variables that would make one W&B run of all
OF_A_LAUNCHER = ("SLURM_", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")  # begin variables that number the workers


@dataclass(frozen=True)
class Job:
    """What a worker needs to know."""

    run: Run
    study: str  # the topic of its events, and the key under which the client leaves a signal that stops all runs
    directory: str  # in which relative paths of the options are meant
    threads: int
    gpus: int


@dataclass(frozen=True)
class Outcome:
    """How a run has ended: with its result and token losses, or with an exit status and a reason, or stopped."""

    result: Result | None = None
    token_nll: TokenNLL | None = None
    status: int = 0
    reason: str = ""


def train(job: Job) -> Outcome:
    """Starts or resumes a run, unless it has ended already, and measures it. Called on a worker, again if one dies."""
    run, status, reason = job.run, 0, ""
    if not run.has_ended():
        if pending_stop(job) is not None:
            return Outcome()
        get_worker().log_event(job.study, {"started": str(run), "resumes": run.can_resume})
        status, reason = _train_in_process(job)
    if status or not run.has_ended():
        return Outcome(status=status, reason=reason)
    fit = shlex.join(["minigpt", "fit", *run.args, "--seed_everything", str(run.seed)])
    torch.set_num_threads(job.threads)
    try:
        return Outcome(*measure(run.run_dir, run.name, run.seed, fit, describe_machine(job.threads)))
    except UserError as error:
        return Outcome(status=2, reason=str(error))


def pending_stop(job: Job) -> int | None:
    """The signal that the client has left for all runs."""
    number: int | None = get_client().get_metadata([job.study], default=None)
    return number


def _train_in_process(job: Job) -> tuple[int, str]:
    """Exit status and reason of the run's process; 0 and "" if it has ended as it should, or was stopped."""
    log = job.run.run_dir.with_name(f"{job.run}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + LOCK_PATIENCE
    while True:
        with _environment(job) as env, log.open("ab") as file:
            status, stopped = _wait(job, start(job, file, env))
        if stopped or status == 0 and job.run.has_ended():
            return 0, ""
        lines = log.read_text("utf-8", "replace").rstrip().split("\n")
        if LOCKED not in lines[-1] or time.monotonic() > give_up:
            return 128 - status if status < 0 else status or 1, f"{lines[-1].strip()} (exit status {status}; {log})"
        time.sleep(LOCK_PAUSE)  # the process of a worker that has died is still saving


def start(job: Job, log: BinaryIO, env: dict[str, str]) -> "subprocess.Popen[bytes]":
    """The process of a run, in its own session, which Ctrl-C does not reach, and with a pipe that ends with us."""
    return subprocess.Popen(
        [sys.executable, "-m", "minigpt_pl.experiments.attached", "fit", *job.run.fit_args()],
        stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, cwd=job.directory, env=env,
    )  # fmt: skip


def _wait(job: Job, process: "subprocess.Popen[bytes]") -> tuple[int, bool]:
    """Waits for a process; passes a signal on, once. Returns the exit status, and whether a signal was passed on."""
    signalled = False
    with process:
        try:
            while True:
                try:
                    return process.wait(POLL_SECONDS), signalled
                except subprocess.TimeoutExpired:
                    if not signalled and (number := pending_stop(job)) is not None:
                        process.send_signal(number)  # a second one would end it without a checkpoint
                        signalled = True
        finally:
            process.terminate()  # if the scheduler has gone


@contextmanager
def _environment(job: Job) -> Iterator[dict[str, str]]:
    """The variables of a run's process. Its GPUs are its own as long as it runs."""
    package = str(Path(__file__).parents[2])  # also of a checkout that is not installed
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {k: v for k, v in os.environ.items() if k not in OF_ONE_RUN and not k.startswith(OF_A_LAUNCHER)}
    env |= {"OMP_NUM_THREADS": str(job.threads), "PYTHONPATH": path}
    gpus = [_free_gpus().get() for _ in range(job.gpus)]
    try:
        yield env | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
    finally:
        for gpu in gpus:
            _free_gpus().put(gpu)


def visible_gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(map(str, range(torch.cuda.device_count()))) if chosen is None else [x for x in chosen.split(",") if x]


@cache
def _free_gpus() -> "SimpleQueue[str]":
    """Those that no run of this worker has. Dask starts no more runs than there are GPUs for."""
    free: SimpleQueue[str] = SimpleQueue()
    for gpu in visible_gpus():
        free.put(gpu)
    return free


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(threads: int) -> str:
    """The worker's machine, and how it is shared."""
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    cores, jobs = f"CPU cores: {count_cores()} ({platform.machine()})", get_worker().state.nthreads
    return f"{device}{cores}, runs at a time: {jobs}, threads of each: {threads}"
