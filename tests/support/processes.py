"""Real processes, started by the README's command and stopped at a chosen moment, and the files that they leave.

`witness/sitecustomize.py`, which Python loads into each process, writes where in a run the process is.
"""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.checkpoint.run_dir import RUN_FILES

PROJECT = Path(__file__).parents[2]
PLACES = ("start", "step", "evaluation", "write", "end")
"""Start-up; an optimizer step; an evaluation; while a checkpoint is written; after training."""


@dataclass
class Landed:
    """Where a signal reached a process, and how the process ended."""

    signal: str
    place: str
    step: int
    status: int
    err: str

    def __str__(self) -> str:
        return f"{self.signal:14} in {self.place:10} of step {self.step:3}: exit status {self.status}"


class Process:
    """`python main.py fit ...` in a process group of its own, on one thread."""

    def __init__(self, args: tuple[Any, ...], run_dir: Path, **env: str):
        self.run_dir, self.witness = run_dir, run_dir.with_name(f"{run_dir.name}.place")
        self.log = run_dir.with_name(f"{run_dir.name}.log")
        environment = os.environ | {
            "WITNESS": str(self.witness), "OMP_NUM_THREADS": "1", "WANDB_ERROR_REPORTING": "false",
            "PYTHONPATH": str(Path(__file__).parent / "witness"), **env,
        }  # fmt: skip
        command = [sys.executable, "main.py", *map(str, args), "--run_dir", str(run_dir)]
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                command, cwd=PROJECT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def place(self) -> tuple[str, int]:
        """Where the process is, or was when it died."""
        if any(self.run_dir.glob("*.ckpt.writing")):
            return "write", self._marked()[1]
        return self._marked()

    def _marked(self) -> tuple[str, int]:
        fields = self.witness.read_text().split() if self.witness.exists() else []
        return (fields[0], int(fields[1])) if len(fields) == 2 else ("start", 0)

    def wait_for(self, place: str, step: int = 0) -> None:
        """Returns when the process is in a place, at this step or later, or has ended."""
        until = time.monotonic() + 120
        while self.popen.poll() is None and time.monotonic() < until:
            here, at = self.place()
            if here == place and at >= step:
                return
            time.sleep(0.0002)

    def send(self, name: str) -> Landed:
        """Sends SIGKILL, SIGTERM, SIGINT, or "group SIGINT" as a terminal does, and waits for the end."""
        place, step = self.place()
        number = signal.Signals[name.removeprefix("group ")]
        if name.startswith("group"):
            os.killpg(self.popen.pid, number)
        else:
            self.popen.send_signal(number)
        status = self.popen.wait(300)
        if number == signal.SIGKILL:
            place, step = self.place()
        return Landed(name, place, step, status, self.log.read_text("utf-8"))

    def end(self) -> int:
        return self.popen.wait(300)


def faults(landed: Landed, run_dir: Path) -> list[str]:
    """Errors in the way a process ended and in the files that it left."""
    expected = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "group SIGINT": 130, "SIGHUP": 143}[landed.signal]
    out = []
    if landed.status != expected and (landed.status, landed.place) != (0, "end"):
        out.append(f"exit status {landed.status}, not {expected}: {landed.err[-500:]}")
    lines = landed.err.splitlines()
    if landed.signal == "SIGKILL":  # of another process torch tells, sometimes in time, that it lost its connection
        lines = [line for line in lines if not line.startswith("[rank")]
    if any("Traceback" in line for line in lines):
        out.append(landed.err[-1500:])
    for path in run_dir.glob("*.ckpt"):
        try:
            read_checkpoint(path)
        except ValueError as error:
            out.append(str(error))
    if landed.signal != "SIGKILL":
        out += [f"left behind: {path.name}" for path in run_dir.glob("*.writing")]
        if not (run_dir / "last.ckpt").exists():
            out += [f"unfinished: {name}" for name in RUN_FILES if (run_dir / name).exists()]
    return out


def draw(number: int) -> tuple[str, str, int, float]:
    """A signal, a place, a step and a delay in seconds: kill number `number` of a long series."""
    chance = random.Random(number)
    place = PLACES[number % len(PLACES)]
    how = ("SIGKILL", "SIGTERM", "SIGINT", "group SIGINT")[number // len(PLACES) % 4]
    if place == "start":
        return how, place, 0, chance.uniform(0, 5)
    return how, place, chance.randint(1, 14), chance.uniform(0, 0.004)
