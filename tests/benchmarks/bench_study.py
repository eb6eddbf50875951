"""What a study takes from the training of its runs: the CPU time of its own process, which hosts the Dask cluster."""

import time
from typing import Any

import pytest
from benchmarks.measuring import Report
from distributed import get_client

from minigpt_pl.experiments import cluster

pytestmark = pytest.mark.bench

SECONDS, ROUNDS = 5.0, 4


def wait_like_a_run(seconds: float) -> None:
    """What a worker does while the process of a run trains: it asks the scheduler for a signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        get_client().get_metadata(["study"], default=None)
        time.sleep(0.5)


def cpu_share(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> float:
    """CPU seconds per second of a local cluster with two runs, in percent of a core."""
    monkeypatch.setattr(cluster, "LOCAL_OPTIONS", options)
    needed = cluster.needs(threads=1, gpus=0)
    with cluster.local_client(jobs=2, threads=1, gpus=0) as client:
        futures = [client.submit(wait_like_a_run, SECONDS + 1, key=f"run {i}", resources=needed) for i in range(2)]
        time.sleep(1)
        start, end = time.process_time(), time.monotonic() + SECONDS
        while time.monotonic() < end:
            cluster.room_for(client, needed)
            time.sleep(0.2)
        share = 100 * (time.process_time() - start) / SECONDS
        client.gather(futures)
    return share


def test_cpu_of_the_cluster(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"the study's settings": cluster.LOCAL_OPTIONS, "Dask's own": {"distributed.scheduler.worker-ttl": None}}
    shares: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(ROUNDS):
        for name, options in settings.items():
            shares[name].append(cpu_share(options, monkeypatch))
    report.add("CPU time of a study's own process with two runs", "%", shares)
