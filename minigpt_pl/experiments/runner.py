"""`minigpt study`: executes the runs of a study file, each in its own process, and stores their results.

The plan of a study is in `spec`, the stored results in `results`, the report in `report`.
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from minigpt_pl.data.baselines import MAX_BASELINE_CHARACTERS, split_baselines
from minigpt_pl.experiments import spec
from minigpt_pl.experiments.analysis import StudyAnalysis, read_json, write_json
from minigpt_pl.experiments.report import overview
from minigpt_pl.experiments.results import (
    Result,
    add_result,
    datamodule_of,
    measure,
    read_results,
    split_basis,
    strip_paths,
)
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.errors import UserError, rank_zero_print
from minigpt_pl.runtime.quiet import silence_libraries
from minigpt_pl.training.progress import format_duration

REPORT_INTERVAL = 300.0  # seconds without other output after which the progress is printed
OF_ONE_RUN = ("WANDB_NAME", "WANDB_RUN_ID")  # variables that would make one W&B run of all


class Runner:
    """Executes runs in their order, `jobs` at a time. `store` stores the result of a run that has ended."""

    def __init__(self, runs: list[spec.Run], jobs: int, store: Callable[[spec.Run], Result]):
        self.runs, self.jobs, self.store = runs, jobs, store
        self.failed: dict[str, tuple[int, str]] = {}  # exit status and reason
        self.remaining = list(runs)
        self.processes: dict[spec.Run, subprocess.Popen[bytes]] = {}
        self.began = self.printed = time.monotonic()
        self.steps_before = sum(run.steps() for run in runs)

    def run(self) -> None:
        """Returns when all runs have ended, or when a signal has stopped them."""
        signals.exit_hooks.append(self.terminate)
        signals.defer(True)
        pool, signalled = ThreadPoolExecutor(self.jobs), set[spec.Run]()
        futures = {pool.submit(self.train, run): run for run in self.runs}
        try:
            while futures:
                for future in wait(futures, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    self.finish(futures.pop(future), *future.result())
                running = {run: process for run, process in [*self.processes.items()] if process.returncode is None}
                if (number := signals.pending_signal) is not None:
                    for run in running.keys() - signalled:  # a second signal would end a run without a checkpoint
                        running[run].send_signal(number)
                        signalled.add(run)
                elif time.monotonic() - self.printed > REPORT_INTERVAL:
                    self.print(", ".join(f"{run} at step {run.steps()}" for run in running))
        finally:
            self.terminate()
            pool.shutdown(cancel_futures=True)
            signals.exit_hooks.remove(self.terminate)

    def train(self, run: spec.Run) -> tuple[int, str]:
        """Trains one run, in a thread that waits for its process; returns the exit status and, if it failed, why."""
        if run.has_ended() or signals.pending_signal is not None:
            return 0, ""
        self.print(f"{run} {'resumes' if run.can_resume else 'starts'}")
        log = run.run_dir.with_name(f"{run}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        package = str(Path(__file__).parents[2])  # also of a checkout that is not installed
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {name: text for name, text in os.environ.items() if name not in OF_ONE_RUN}
        with log.open("ab") as file:  # in its own session, Ctrl-C reaches it once, through this process
            process = self.processes[run] = subprocess.Popen(
                [sys.executable, "-m", "minigpt_pl", "fit", *run.fit_args()],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                env=env | {"OMP_NUM_THREADS": str(threads_of(self.jobs)), "PYTHONPATH": path},
            )  # fmt: skip
        status = process.wait()
        if status == 0 and run.has_ended():
            return 0, ""
        lines = log.read_text("utf-8", "replace").rstrip().split("\n")
        reason = f"{lines[-1].strip()} (exit status {status}; {log})"
        return 128 - status if status < 0 else status or 1, reason

    def finish(self, run: spec.Run, status: int, reason: str) -> None:
        """Stores the result of a run, or reports its failure."""
        if signals.pending_signal is not None and not run.has_ended():
            return  # the same command resumes it
        self.remaining.remove(run)
        if status == 0:
            try:
                summary = self.store(run).summary
            except UserError as error:
                status, reason = 2, str(error)
        if status:
            self.failed[str(run)] = status, reason
            self.print(f"{run} FAILED: {reason}")
        else:
            loss = f"{summary['best_nats_per_char']:.4f} nats/char at step {summary['best_step']}"
            self.print(f"{run} done: {loss}, {format_duration(summary['wall_seconds'])}")

    def terminate(self) -> None:
        for process in [*self.processes.values()]:
            process.terminate()

    def print(self, message: str) -> None:
        """A line with the number of ended runs and, from the steps per second so far, the time left."""
        self.printed, time_left = time.monotonic(), ""
        if self.remaining:
            done = sum(run.steps() for run in self.runs) - self.steps_before
            left = sum(run.config["trainer"]["max_steps"] - run.steps() for run in self.remaining)
            pace = (self.printed - self.began) / done if done > 0 else None  # seconds per step
            time_left = f"; about {format_duration(pace * left)} left" if pace else "; time left unknown"
        print_line(f"[{len(self.runs) - len(self.remaining)}/{len(self.runs)}] {message}{time_left}")


def print_line(line: str) -> None:
    with suppress(OSError):  # the study continues when the reader of its output has gone
        print(f"{line}\n", end="", flush=True)  # one write, since threads print too


def threads_of(jobs: int) -> int:
    """Threads of each of several processes that share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


def describe_machine(jobs: int) -> str:
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    cores = f"CPU cores: {threads_of(1)} ({platform.machine()})"
    return f"{device}{cores}, runs at a time: {jobs}, threads of each: {threads_of(jobs)}"


def baselines_of(run: spec.Run) -> dict[str, Any]:
    """n-gram and xz baselines of a run's text, with its hash and split; {} for a long text."""
    config, data = run.config["data"], datamodule_of(run.config)
    if data.text_stats.characters > MAX_BASELINE_CHARACTERS:
        return {}
    split = {name: config[name] for name in ("train_frac", "test_frac")}
    split["split_basis"] = split_basis(config, data.tokenizer.sha256)
    return {"data_sha256": data.text_stats.sha256, **split, "baselines": split_baselines(data)}


def build_parser(command: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"minigpt {command}", exit_on_error=False, description=__doc__)
    parser.add_argument("file", type=str, help="A study file, or the name of a shipped study such as ablations.")
    parser.add_argument("--seeds", type=int | None, default=None, help="Seeds of each run; else as the study says.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time, which share the cores.")
    parser.add_argument("--only", type=str, nargs="+", default=[], help="Names of the runs to do; else all.")
    parser.add_argument("--out", type=str, default="", help="Directory of the results; default docs/results/NAME.")
    parser.add_argument("--run_dir", type=str, default="", help="Parent of the run directories; default runs/NAME.")
    return parser


def run(command: str, options: list[str]) -> int:
    """Runs or resumes a study, and prints its results so far; returns the exit status."""
    args = build_parser(command).parse_args(options)
    for name, value in (("jobs", args.jobs), ("seeds", args.seeds)):
        if value is not None and value < 1:
            raise UserError("it must be at least 1", option=f"--{name}", value=value)
    silence_libraries()
    study = spec.read_study(spec.find_study(args.file))
    out = Path(args.out or f"docs/results/{study.name}")
    runs = spec.plan(study, out, Path(args.run_dir or f"runs/{study.name}"), args.seeds, args.only)
    stored = {str(result): result for result in read_results(out)}
    for one in runs:  # before anything is written
        one.check(stored.get(str(one)))
    spec.save_study(study, out)
    if not (out / spec.BASELINES_FILE).exists():
        write_json(out / spec.BASELINES_FILE, baselines_of(runs[0]))
    machine = describe_machine(args.jobs)
    torch.set_num_threads(threads_of(args.jobs))

    def store(run: spec.Run) -> Result:
        fit = shlex.join(["minigpt", "fit", *run.args, "--seed_everything", str(run.seed)])
        result, nll = measure(run.run_dir, run.name, run.seed, fit, machine)
        add_result(out, result, nll)
        return result

    todo = [run for run in runs if str(run) not in stored]
    if len(todo) < len(runs):
        print_line(f"{len(runs) - len(todo)} of {len(runs)} runs have results already")
    runner = Runner(todo, args.jobs, store)
    runner.run()
    finished = {str(result) for result in read_results(out)}
    failed = read_json(out / spec.FAILED_FILE) | {name: strip_paths(why) for name, (_, why) in runner.failed.items()}
    write_json(out / spec.FAILED_FILE, {name: why for name, why in failed.items() if name not in finished})
    number = signals.pending_signal
    if number is None and finished and find_spec("scipy"):
        signals.defer(False)
        print_line(f"\n{overview(StudyAnalysis(out))}\n\nfor tables and plots: minigpt report {out}")
    for name, (_, reason) in runner.failed.items():
        rank_zero_print(f"failed: {name}: {reason}")
    if number is not None:
        print_line(f"stopped; the same command resumes the study: minigpt {command} {shlex.join(options)}")
        return 128 + number
    return next((status for status, _ in runner.failed.values()), 0)
