"""`minigpt study`: gives the runs of a study file to a Dask cluster, one task each, and stores their results.

The plan of a study is in `spec`, the cluster in `cluster`, what a worker does in `tasks`, the stored results in
`results`, the report in `report`.
"""

import os
import pickle
import secrets
import shlex
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from minigpt_pl.data.baselines import MAX_BASELINE_CHARACTERS, split_baselines
from minigpt_pl.experiments import spec
from minigpt_pl.experiments.analysis import StudyAnalysis, read_json, write_json
from minigpt_pl.experiments.report import overview
from minigpt_pl.experiments.results import add_result, datamodule_of, read_results, split_basis, strip_paths
from minigpt_pl.runtime import signals
from minigpt_pl.runtime.errors import UserError, one_line, rank_zero_print
from minigpt_pl.runtime.quiet import silence_libraries
from minigpt_pl.training.progress import format_duration

if TYPE_CHECKING:
    from distributed import Client, Future

    from minigpt_pl.experiments.tasks import Outcome

POLL_SECONDS = 0.2
REPORT_INTERVAL = 300.0  # seconds without other output after which the progress is printed


class Runner:
    """Trains runs on a cluster, the first ones first, and stores the result of each as it ends.

    Args:
        runs: The runs.
        client: Of the cluster.
        threads: CPU threads of a run.
        gpus: GPUs of a run.
        out: Directory of the results.
    """

    def __init__(self, runs: list[spec.Run], client: "Client", threads: int, gpus: int, out: Path):
        self.runs, self.client, self.threads, self.gpus, self.out = runs, client, threads, gpus, out
        self.failed: dict[str, tuple[int, str]] = {}  # exit status and reason
        self.remaining = list(runs)
        self.study = f"minigpt-{secrets.token_hex(4)}"
        self.began = self.printed = time.monotonic()
        self.steps_before = sum(run.steps() for run in runs)

    def run(self) -> None:
        """Returns when all runs have ended, or when a signal has stopped them."""
        signals.defer(True)
        self.client.subscribe_topic(self.study, self.started)
        futures: dict[Future[Outcome], spec.Run] = {}
        waiting, signalled = deque(self.runs), False
        while futures or waiting:
            self.submit(waiting, futures)
            time.sleep(POLL_SECONDS)
            for future in [future for future in futures if future.done()]:
                self.finish(futures.pop(future), future)
            if (number := signals.pending_signal) is None:
                if time.monotonic() - self.printed > REPORT_INTERVAL:
                    self.print(", ".join(f"{run} at step {n}" for run in futures.values() if (n := run.steps())))
                continue
            waiting.clear()
            if not signalled:
                self.client.set_metadata([self.study], int(number))  # each run's worker passes it on
                signalled = True
            on_workers = {key for keys in self.client.processing().values() for key in keys}
            for future in [one for one in futures if not one.done() and one.key not in on_workers]:
                del futures[future]  # no worker has it

    def submit(self, waiting: "deque[spec.Run]", futures: "dict[Future[Outcome], spec.Run]") -> None:
        """Gives runs to the cluster as long as it has room, and one more, which shows that it could use more workers.

        Dask binds a task to a worker at once. With all tasks there, a worker that joins later would take any of them.
        """
        from minigpt_pl.experiments.cluster import call, needs, room_for
        from minigpt_pl.experiments.tasks import Job, train

        needed = needs(self.threads, self.gpus)
        while len(futures) <= room_for(self.client, needed) and (run := self.next_run(waiting)):
            task = pickle.dumps((train, Job(run, self.study, os.getcwd(), self.threads, self.gpus)))
            key, priority = f"{run}-{self.study}", -self.runs.index(run)
            futures[self.client.submit(call, task, key=key, resources=needed, priority=priority)] = run

    def next_run(self, waiting: "deque[spec.Run]") -> spec.Run | None:
        """Takes the first run out of those that wait whose used runs have ended. One that uses a failed run fails."""
        unfinished = set(map(str, self.remaining))
        for run in list(waiting):
            if failed := next((name for name in run.uses if name in self.failed), None):
                waiting.remove(run)
                self.fail(run, 1, f"it uses {failed}, which failed")
            elif not unfinished.intersection(run.uses):
                waiting.remove(run)
                return run
        return None

    def started(self, event: tuple[float, dict[str, Any]]) -> None:
        self.print(f"{event[1]['started']} {'resumes' if event[1]['resumes'] else 'starts'}")

    def finish(self, run: spec.Run, future: "Future[Outcome]") -> None:
        """Stores the result of a run, or reports its failure."""
        status, reason, result = 1, "", None
        try:
            outcome = future.result()
            status, reason, result = outcome.status, outcome.reason, outcome.result
        except Exception as error:  # whatever went wrong on a worker, such as another version of the package there
            reason = f"{type(error).__name__}: {one_line(error)}"
        else:
            if result is not None and outcome.token_nll is not None:
                add_result(self.out, result, outcome.token_nll)
            elif signals.pending_signal is not None:
                return  # the same command resumes it
        if result is None:
            self.fail(run, status, reason)
            return
        self.remaining.remove(run)
        loss = f"{result.summary['best_nats_per_char']:.4f} nats/char at step {result.summary['best_step']}"
        self.print(f"{run} done: {loss}, {format_duration(result.summary['wall_seconds'])}")

    def fail(self, run: spec.Run, status: int, reason: str) -> None:
        self.remaining.remove(run)
        self.failed[str(run)] = status, reason
        self.print(f"{run} FAILED: {reason}")

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
    parser.add_argument("--jobs", type=int | None, default=None, help="Runs at a time on this machine; default 1.")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of a run; default cores / jobs.")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each run has to itself; 0 shares them.")
    parser.add_argument("--scheduler", type=str, default="", help="A Dask cluster, as tcp://HOST:PORT, to train on.")
    parser.add_argument("--only", type=str, nargs="+", default=[], help="Names of the runs to do; else all.")
    parser.add_argument("--out", type=str, default="", help="Directory of the results; default docs/results/NAME.")
    parser.add_argument("--run_dir", type=str, default="", help="Parent of the run directories; default runs/NAME.")
    return parser


@contextmanager
def cluster_for(args: Any) -> Iterator[tuple["Client", int]]:
    """The client of the cluster that the options ask for, and the threads of a run.

    Raises:
        UserError: If an option is out of its range, or there is no such cluster.
    """
    try:
        from minigpt_pl.experiments import cluster, tasks
    except ImportError as error:
        problem = f"a study needs the package distributed ({one_line(error)})"
        raise UserError(problem, remedy='pip install "minigpt_pl[study]"') from error
    if args.scheduler:
        threads = args.threads or 1
        with cluster.remote_client(args.scheduler, threads, args.gpus) as client:
            yield client, threads
        return
    jobs, gpus = args.jobs or 1, len(tasks.visible_gpus()) if args.gpus else 0
    if args.gpus > gpus:
        raise UserError(f"this machine has {gpus}", option="--gpus", value=args.gpus)
    threads = args.threads or max(1, tasks.count_cores() // jobs)
    with cluster.local_client(jobs, threads, gpus) as client:
        yield client, threads


def check_numbers(args: Any) -> None:
    """Raises UserError for a number out of its range, or one that has no meaning on a cluster."""
    for name, least in {"jobs": 1, "seeds": 1, "threads": 1, "gpus": 0}.items():
        if (value := args[name]) is not None and value < least:
            raise UserError(f"it must be at least {least}", option=f"--{name}", value=value)
    if args.scheduler and args.jobs:
        remedy = "leave it out: each worker trains as many as it has room for"
        raise UserError("the cluster decides it", option="--jobs", value=args.jobs, remedy=remedy)


def run(command: str, options: list[str]) -> int:
    """Runs or resumes a study, and prints its results so far; returns the exit status."""
    args = build_parser(command).parse_args(options)
    check_numbers(args)
    silence_libraries()
    study = spec.read_study(spec.find_study(args.file))
    out = Path(args.out or f"docs/results/{study.name}")
    runs = spec.plan(study, out, Path(args.run_dir or f"runs/{study.name}"), args.seeds, args.only)
    stored = {str(result): result for result in read_results(out)}
    for one in runs:  # before anything is written
        one.check(stored.get(str(one)))
    todo = [run for run in runs if str(run) not in stored]
    failed_now: dict[str, tuple[int, str]] = {}
    with cluster_for(args) if todo else nullcontext() as cluster:
        spec.save_study(study, out)
        if not (out / spec.BASELINES_FILE).exists():
            write_json(out / spec.BASELINES_FILE, baselines_of(runs[0]))
        if len(todo) < len(runs):
            print_line(f"{len(runs) - len(todo)} of {len(runs)} runs have results already")
        if args.scheduler:  # whose workers have other working directories
            todo = [replace(run, run_dir=run.run_dir.absolute()) for run in todo]
        if cluster:
            todo[0].run_dir.parent.mkdir(parents=True, exist_ok=True)
            runner = Runner(todo, *cluster, args.gpus, out)
            runner.run()
            failed_now = runner.failed
    finished = {str(result) for result in read_results(out)}
    failed = read_json(out / spec.FAILED_FILE) | {name: strip_paths(why) for name, (_, why) in failed_now.items()}
    write_json(out / spec.FAILED_FILE, {name: why for name, why in failed.items() if name not in finished})
    number = signals.pending_signal
    if number is None and finished and find_spec("scipy"):
        signals.defer(False)
        print_line(f"\n{overview(StudyAnalysis(out))}\n\nfor tables and plots: minigpt report {out}")
    for name, (_, reason) in failed_now.items():
        rank_zero_print(f"failed: {name}: {reason}")
    if number is not None:
        print_line(f"stopped; the same command resumes the study: minigpt {command} {shlex.join(options)}")
        return 128 + number
    return next((status for status, _ in failed_now.values()), 0)
