"""`minigpt study`: carries out the runs of a study file, each in a process of its own, until all are done.

What a study file plans is in `plans`, what a run leaves for the report in `results`, what these say in `report`.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from minigpt_pl.checkpoint.io import LAST_CKPT
from minigpt_pl.cli.help import silence_libraries
from minigpt_pl.data.baselines import MAX_BASELINE_CHARACTERS, compute_baselines
from minigpt_pl.experiments import results
from minigpt_pl.experiments.analysis import StudyAnalysis, read_json
from minigpt_pl.experiments.report import overview
from minigpt_pl.experiments.spec import (
    BASELINES_FILE,
    FAILED_FILE,
    Run,
    find_study,
    plan,
    read_study,
    save_study,
    stats_of_text,
)
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.atomic_io import atomic_write
from minigpt_pl.runtime.errors import UserError, rank_zero_print

REPORT_INTERVAL = 300.0
"""Seconds without news after which a line says how far the runs are."""
POLL_INTERVAL = 0.2


class Progress:
    """What is said while a study runs, and how long it may still take."""

    def __init__(self, runs: list[Run], jobs: int):
        self.runs, self.jobs = runs, jobs
        self.taken: dict[str, list[float]] = {}  # seconds of whole runs, by configuration
        self.ended = 0
        self._said_at = 0.0

    def end(self, run: Run, seconds: float | None) -> None:
        self.ended += 1
        if seconds:
            self.taken.setdefault(run.name, []).append(seconds)

    def whole(self, run: Run, running: list["RunProcess"]) -> float | None:
        """Seconds that a run takes: as others of its configuration did, else at the pace of one under way."""
        if known := self.taken.get(run.name):
            return sum(known) / len(known)
        paces = [pace for one in running if one.run.name == run.name and (pace := one.seconds_a_step())]
        return run.max_steps * paces[0] if paces else None

    def left(self, waiting: list[Run], running: list["RunProcess"]) -> str:
        """The time that all runs may still take; one of which nothing is known takes as long as the others."""
        runs = [*waiting, *(one.run for one in running)]
        shares = [(whole, 1 - run.steps() / run.max_steps) for run in runs if (whole := self.whole(run, running))]
        if not shares:
            return "time left not known yet"
        seconds = sum(whole * max(0.0, share) for whole, share in shares) * len(runs) / len(shares)
        return f"about {format_duration(seconds / min(self.jobs, len(runs)))} left"

    def say(self, what: str, waiting: list[Run], running: list["RunProcess"]) -> None:
        self._said_at = time.monotonic()
        left = f"; {self.left(waiting, running)}" if waiting or running else ""
        print_line(f"[{self.ended}/{len(self.runs)}] {what}{left}")

    def is_due(self) -> bool:
        return time.monotonic() - self._said_at > REPORT_INTERVAL


class RunProcess:
    """A run's process. It stands in a session of its own: what the terminal sends reaches it once, through us."""

    def __init__(self, run: Run, threads: int):
        self.run = run
        run.run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.log = run.run_dir.with_name(f"{run}.log")
        self.began, self.first = time.monotonic(), run.steps()
        home = str(Path(__file__).parents[2])  # also of a checkout that is not installed
        path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "minigpt_pl", "fit", *run.command()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
            )  # fmt: skip

    def seconds_a_step(self) -> float | None:
        done = self.run.steps() - self.first
        return (time.monotonic() - self.began) / done if done > 0 else None

    def problem(self) -> str:
        """Why it failed, in its own last words."""
        lines = self.log.read_text("utf-8", "replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        return f"{last.strip()} (exit status {self.process.returncode}; {self.log})"


def run_all(runs: list[Run], done: list[Run], jobs: int, finish: Callable[[Run], None]) -> dict[str, tuple[int, str]]:
    """Runs what is not done, so many at a time; a signal stops all of them cleanly.

    Args:
        runs: In order.
        done: Those that have results already.
        jobs: Processes at a time; they share the cores.
        finish: Called when a run has ended.

    Returns:
        Of each run that failed, its exit status and why.
    """
    threads = max(1, cpu_count() // jobs)
    progress, failed, running = Progress(runs, jobs), dict[str, tuple[int, str]](), list[RunProcess]()

    def end(run: Run, what: str) -> None:
        try:
            finish(run)
        except UserError as error:
            fail(run, 2, str(error))
            return
        summary = results.Result(run.folder).summary
        progress.end(run, summary["wall_seconds"])
        figure = f"{summary['best_nats_per_char']:.4f} nats/char at step {summary['best_step']}"
        progress.say(f"{run} {what}: {figure}, {format_duration(summary['wall_seconds'])}", waiting, running)

    def fail(run: Run, status: int, why: str) -> None:
        failed[str(run)] = (status, why)
        progress.end(run, None)
        progress.say(f"{run} FAILED: {why}", waiting, running)

    def leave_no_process() -> None:
        for one in running:
            one.process.terminate()

    waiting = [run for run in runs if run not in done]
    for run in done:
        progress.end(run, results.Result(run.folder).summary["wall_seconds"])
    if progress.ended:
        progress.say("done before", waiting, running)
    signals.exit_hooks.append(leave_no_process)
    signals.defer(True)
    told = False
    try:
        while running or waiting and signals.pending_signal is None:
            while waiting and len(running) < jobs and signals.pending_signal is None:
                run = waiting.pop(0)
                if run.has_ended():
                    end(run, "had ended")
                    continue
                resuming = (run.run_dir / LAST_CKPT).is_file()
                running.append(RunProcess(run, threads))
                progress.say(f"{run} {'goes on' if resuming else 'begins'}", waiting, running)
            if signals.pending_signal is not None and not told:
                told = True
                for one in running:
                    one.process.send_signal(signals.pending_signal)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                if one.process.returncode == 0 and one.run.has_ended():
                    end(one.run, "done")
                elif signals.pending_signal is None:
                    status = one.process.returncode
                    fail(one.run, 128 - status if status < 0 else status or 1, one.problem())
            if progress.is_due() and running:
                far = ", ".join(f"{one.run} at step {one.run.steps()}" for one in running)
                progress.say(far, waiting, running)
            time.sleep(POLL_INTERVAL)
    finally:
        leave_no_process()
        signals.exit_hooks.remove(leave_no_process)
    return failed


def cpu_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(jobs: int) -> str:
    """Where the runs of a study ran, in words."""
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    threads = max(1, cpu_count() // jobs)
    return (
        f"{device}CPU cores: {cpu_count()} ({platform.machine()}), runs at a time: {jobs}, threads of each: {threads}"
    )


def format_duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def print_line(line: str) -> None:
    with suppress(OSError):  # a study outlives whoever reads what it prints
        print(line, flush=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes what the report reads with the results; no file where there is nothing."""
    if content:
        atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())
    else:
        path.unlink(missing_ok=True)


def baselines_of(runs: list[Run]) -> dict[str, Any]:
    """n-gram and xz floors of the text that the runs share, with its hash and shares; {} for a long text."""
    text = runs[0].settings["data"]
    if stats_of_text(runs[0].settings).characters > MAX_BASELINE_CHARACTERS:
        return {}
    split = {name: text[name] for name in ("train_frac", "test_frac")}
    return {"data_sha256": runs[0].data_sha256, **split, "baselines": compute_baselines(text["path"], **split)}


def parser_of(command: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description=__doc__)
    parser.add_argument("file", type=str, help="A study file, or a shipped one such as ladder.")
    parser.add_argument("--seeds", type=int | None, default=None, help="Seeds of each run; else as the study says.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time, which share the cores.")
    parser.add_argument("--only", type=str, nargs="+", default=[], help="Names of the runs to do; else all.")
    parser.add_argument("--out", type=str, default="", help="Where results go; docs/results/NAME unless given.")
    parser.add_argument("--run_dir", type=str, default="", help="Where runs train; runs/NAME unless given.")
    return parser


def run(command: str, options: list[str]) -> int:
    """Runs a study, or goes on with it; prints what its results say so far."""
    said = parser_of(command).parse_args(options)
    for name, value in (("seeds", said.seeds), ("jobs", said.jobs)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be at least 1")
    silence_libraries()
    study = read_study(find_study(said.file))
    out = Path(said.out or f"docs/results/{study.name}")
    runs = plan(study, out, Path(said.run_dir or f"runs/{study.name}"), said.seeds, said.only)
    done = [run for run in runs if run.is_done()]  # which refuses what has other settings: before anything is written
    save_study(study, out)
    where = describe_machine(said.jobs)
    torch.set_num_threads(max(1, cpu_count() // said.jobs))

    def finish(run: Run) -> None:
        given = shlex.join(["minigpt", "fit", *run.words, "--seed_everything", str(run.seed)])
        results.write_result(run.run_dir, run.folder, {"command": results.strip_paths_in_text(given), "machine": where})

    if not (out / BASELINES_FILE).exists():
        write_json(out / BASELINES_FILE, baselines_of(runs))
    failed = run_all(runs, done, said.jobs, finish)
    why = read_json(out / FAILED_FILE) | {name: results.strip_paths_in_text(why) for name, (_, why) in failed.items()}
    write_json(out / FAILED_FILE, {name: words for name, words in why.items() if not (out / "runs" / name).is_dir()})
    if (number := signals.pending_signal) is None:
        signals.defer(False)
        if find_spec("scipy") and any((out / "runs").glob("*")):
            print_line(f"\n{overview(StudyAnalysis(out))}\n\npictures and tables: minigpt report {out}")
    for name, (_, words) in failed.items():
        rank_zero_print(f"failed: {name}: {words}")
    if number is not None:
        print_line(f"stopped; the same command goes on: minigpt {command} {shlex.join(options)}")
        return 128 + number
    return next((status for status, _ in failed.values()), 0)
