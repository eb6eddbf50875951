"""Studies on a Dask cluster of real processes on loopback: a worker that is killed, a signal, and what is refused."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from conftest import PROJECT, Outcome
from support.runs import SMALL, differences, rows_of, summary

from minigpt_pl.experiments import tasks
from minigpt_pl.experiments.results import NATS_STEP, measure, read_results, read_token_nll
from minigpt_pl.experiments.tasks import Job

MiniGPT = Callable[..., Outcome]
LONG = ("--trainer.max_steps", 160, "--data.eval_every", 40, "--checkpoint.every_n_train_steps", 15)
BASE = " ".join(map(str, (*SMALL, *LONG, "--data.path", "text.txt")))
ENV = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def directory(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with text.txt and a study of two variants."""
    monkeypatch.chdir(tmp_path)
    Path("trial.yaml").write_text(
        yaml.safe_dump({"base_args": BASE, "runs": {"a": "", "b": "--model.lr 0.01"}, "seeds": 1})
    )
    return tmp_path


class Cluster:
    """A scheduler and workers, each a process of its own, in a working directory of its own."""

    def __init__(self, directory: Path):
        self.file = directory / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.add("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        self.address = ""
        while not self.address:
            time.sleep(0.1)
            if found := re.search(r'"address": "(tcp://.*?)"', self.file.read_text() if self.file.exists() else ""):
                self.address = found[1]

    def add(self, program: str, *options: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", f"distributed.cli.{program}", "--scheduler-file", str(self.file), *options]
        with (self.file.parent / "dask.log").open("ab") as log:
            self.processes.append(subprocess.Popen(command, cwd="/", env=ENV, stdout=log, stderr=log))
        return self.processes[-1]

    def add_worker(self, *options: str) -> "subprocess.Popen[bytes]":
        options = (*options, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")
        return self.add("dask_worker", *options)


@pytest.fixture
def cluster(directory: Path) -> Iterator[Cluster]:
    cluster = Cluster(directory)
    yield cluster
    for process in reversed(cluster.processes):
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def logged(run_dir: Path) -> int:
    return len(rows_of(run_dir)) if (run_dir / "metrics.csv").exists() else 0


def is_under_way(run_dir: Path) -> bool:
    return (run_dir / "last.ckpt").exists() and not (run_dir / "summary.json").exists()


def command_of_child(process: "subprocess.Popen[bytes]") -> list[str]:
    return [word for child in psutil.Process(process.pid).children() for word in child.cmdline()]


@pytest.mark.e2e
def test_the_run_of_a_killed_worker_ends_on_another_one_with_the_weights_of_a_run_alone(
    directory: Path, cluster: Cluster, minigpt: MiniGPT
) -> None:
    """Then Ctrl-C stops a third run on its worker, and the same command continues it."""
    run_dirs = [directory / "runs" / "trial" / f"{name}-1337" for name in "ab"]
    command = [sys.executable, "-m", "minigpt_pl", "study", "trial.yaml", "--scheduler", cluster.address]
    workers = [cluster.add_worker("--resources", "threads=1") for _ in range(2)]
    study = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(map(is_under_way, run_dirs)), study)
    (run_dir,) = [run_dir for run_dir in run_dirs if is_under_way(run_dir)][:1]
    (victim,) = (worker for worker in workers if str(run_dir) in command_of_child(worker))
    victim.kill()
    out, err = study.communicate(timeout=600)
    assert study.returncode == 0, (out, err, (directory / "dask.log").read_text()[-3000:])
    assert len(re.findall(r"-1337 starts", out)) == 2
    assert len(re.findall(r"-1337 resumes", out)) == 1
    logs = [path.read_text("utf-8") for path in Path("runs/trial").glob("*.log")]
    assert sum("stopping after this step" in log for log in logs) == 1  # its process has noticed, and has saved
    assert not list(Path("runs").rglob(".l*"))

    for name, options in {"a": (), "b": ("--model.lr", 0.01)}.items():
        alone, run_dir = directory / f"alone-{name}", directory / "runs" / "trial" / f"{name}-1337"
        done = minigpt("fit", *SMALL, *LONG, *options, "--data.path", "text.txt", "--run_dir", alone)
        assert done.status == 0, done.err
        assert differences(alone, run_dir) == []
        (stored,) = (one for one in read_results(Path("docs/results/trial")) if one.name == name)
        result, nll = measure(run_dir, name, 1337, stored.command, stored.machine)
        assert stored == result
        rounded = np.round(nll.total / NATS_STEP) * NATS_STEP
        assert read_token_nll(Path("docs/results/trial"))[name].total.tolist() == rounded.tolist()

    more = [*command, "--only", "a", "--seeds", "2"]
    third = directory / "runs" / "trial" / "a-1338"
    study = subprocess.Popen(more, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: logged(third) > 3, study)
    study.send_signal(signal.SIGINT)
    out, err = study.communicate(timeout=600)
    assert study.returncode == 130, (out, err)
    assert "the same command resumes the study" in out
    assert summary(third)["stop_reason"] == "interrupted"
    again = subprocess.run(more, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "a-1338 resumes" in again.stdout
    assert summary(third)["total_steps"] == 160


@pytest.mark.e2e
def test_a_cluster_that_cannot_take_a_run_is_refused(directory: Path, cluster: Cluster, minigpt: MiniGPT) -> None:
    cluster.add_worker()
    while (
        "Registered" not in (directory / "dask.log").read_text()
        and "Starting established" not in (directory / "dask.log").read_text()
    ):
        time.sleep(0.1)
    done = minigpt("study", "trial.yaml", "--scheduler", cluster.address, "--threads", 2, "--gpus", 1)
    wanted = "threads=2 GPU=1"
    assert done.err == (
        f"error: --scheduler {cluster.address}: no worker offers {wanted}; "
        f'start workers with: dask worker {cluster.address} --resources "{wanted}"\n'
    )
    assert (done.status, done.out) == (2, "")
    assert not Path("docs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheduler", "tcp://127.0.0.1:9"), "error: --scheduler tcp://127.0.0.1:9: no scheduler answers ("),
        (("--scheduler", "nonsense"), "error: --scheduler nonsense: no scheduler answers ("),
        (("--scheduler", "tcp://h:1", "--jobs", 2), "error: --jobs 2: the cluster decides it; leave it out"),
        (("--gpus", 99), "error: --gpus 99: this machine has "),
        (("--threads", 0), "error: --threads 0: it must be at least 1"),
    ],
)
def test_an_option_that_cannot_be_met_is_refused(
    directory: Path, minigpt: MiniGPT, options: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigpt_pl.experiments import cluster

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    done = minigpt("study", "trial.yaml", *options)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(message)
    assert done.err.count("\n") == 1
    assert not Path("docs").exists()


def test_each_run_has_its_gpus_to_itself(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt_pl.experiments.spec import plan, read_study

    (run, _) = plan(read_study(Path("trial.yaml")), Path("out"), Path("runs"), 1, [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    monkeypatch.setenv("SLURM_PROCID", "2")
    tasks._free_gpus.cache_clear()
    one, two, none = (Job(run, "study", ".", 1, gpus) for gpus in (1, 2, 0))
    with tasks._environment(one) as first, tasks._environment(two) as second:
        assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("3", "5,6")
        assert "SLURM_PROCID" not in first  # or the process would take itself for one of several
    with tasks._environment(two) as again, tasks._environment(none) as all_of_them:
        assert again["CUDA_VISIBLE_DEVICES"] == "5,6"
        assert all_of_them["CUDA_VISIBLE_DEVICES"] == "3,5,6"
    tasks._free_gpus.cache_clear()


SUSPENDED = """
import os, subprocess, time
import dask
from minigpt_pl.experiments.cluster import local_client

if __name__ == "__main__":
    dask.config.set({"distributed.scheduler.worker-ttl": "1s"})
    with local_client(jobs=1, threads=1, gpus=0) as client:
        future = client.submit(time.sleep, 11, resources={"threads": 1})
        time.sleep(1)
        subprocess.Popen(["sh", "-c", f"kill -STOP {os.getpid()}; sleep 8; kill -CONT {os.getpid()}"])
        future.result(timeout=30)
        print("done")
"""


def test_a_study_survives_a_laptops_sleep(tmp_path: Path) -> None:
    """Its worker has not been heard for longer than Dask waits (here five seconds, else five minutes)."""
    (tmp_path / "suspended.py").write_text(SUSPENDED)
    command = [sys.executable, "suspended.py"]
    output = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    assert output.stdout == "done\n", output.stderr[-2000:]
