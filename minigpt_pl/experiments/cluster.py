"""The Dask cluster that trains the runs of a study: one in this process, or one that the user has started.

What a worker does with a run is in `tasks`.
"""

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
from distributed import Client, LocalCluster

from minigpt_pl.runtime.errors import UserError

CONNECT_SECONDS = 10
LOOPBACK = "127.0.0.1:0"  # of the status pages, which Dask serves to the whole network by default
LOCAL_OPTIONS = {
    # The worker lives as long as this process. After a pause, such as a laptop's sleep, it would count as dead.
    "distributed.scheduler.worker-ttl": None,
    # Dask watches itself up to a hundred times a second, which takes a tenth of a core from the training.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "10s",
}


def needs(threads: int, gpus: int) -> dict[str, float]:
    """What one run takes of a worker, by the names in `dask worker --resources "threads=4 GPU=1"`."""
    return {"threads": threads, **({"GPU": gpus} if gpus else {})}


def workers_of(client: Client) -> list[dict[str, Any]]:
    return list(client.scheduler_info(n_workers=-1)["workers"].values())


def room_for(client: Client, needed: dict[str, float]) -> int:
    """How many runs the workers can train at a time."""
    return sum(
        min(worker["nthreads"], *(int(worker["resources"].get(name, 0) // number) for name, number in needed.items()))
        for worker in workers_of(client)
    )


def call(payload: bytes) -> Any:
    """A task: a pickled function and its argument. Their modules are imported here, in a thread of the worker.

    Dask would import them in its event loop, and a worker that imports torch for half a minute seems to be dead.
    """
    function, argument = pickle.loads(payload)
    return function(argument)


@contextmanager
def local_client(jobs: int, threads: int, gpus: int) -> Iterator[Client]:
    """A cluster inside this process, which trains `jobs` runs at a time.

    Args:
        jobs: Runs at a time.
        threads: Of each run.
        gpus: GPUs of this machine.
    """
    with (
        dask.config.set(LOCAL_OPTIONS),
        LocalCluster(
            n_workers=1, threads_per_worker=jobs, processes=False, resources=needs(jobs * threads, gpus),
            dashboard_address=LOOPBACK, worker_dashboard_address=LOOPBACK, memory_limit=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        yield client


@contextmanager
def remote_client(address: str, threads: int, gpus: int) -> Iterator[Client]:
    """The cluster of a scheduler. It may have no workers yet.

    Raises:
        UserError: If no scheduler answers, or none of its workers can take a run.
    """
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        remedy = "start one with dask scheduler, and name it as tcp://HOST:PORT"
        raise UserError(
            f"no scheduler answers ({error})", option="--scheduler", value=address, remedy=remedy
        ) from error
    with client:
        needed = needs(threads, gpus)
        if workers_of(client) and not room_for(client, needed):
            wanted = " ".join(f"{name}={number}" for name, number in needed.items())
            remedy = f'start workers with: dask worker {address} --resources "{wanted}"'
            raise UserError(f"no worker offers {wanted}", option="--scheduler", value=address, remedy=remedy)
        yield client
