"""What the tests share: the command line called in process, a small text, and a cache and signals left as they were."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from minigpt_pl.__main__ import main

settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

pytest_plugins = ["benchmarks.plugin", "support.browser"]
PROJECT = Path(__file__).parents[1]
TINY = ("-c", "smoke", "--wandb", "null", "--samples", "null", "--data.train_frac", "0.995")
"""Options of a fit that takes less than a second: a larger part to check on would take most of it."""


@dataclass
class Outcome:
    """What a command did: exit status, stdout, stderr."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests share the cores with whatever else runs, and the token cache with nobody."""
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:  # they would change every run
        del os.environ[name]
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup would not see it
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_search_path() -> Iterator[None]:
    """Each command makes the modules of its directory importable, which must not reach the next test."""
    path = list(sys.path)
    yield
    sys.path[:] = path


@pytest.fixture
def minigpt(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command in this process, as `minigpt ...` would: minigpt("fit", *TINY, "--run_dir", tmp_path / "r")."""

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # --help
            status = int(stop.code or 0)
        return Outcome(status, *capfd.readouterr())

    return call


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Four kilobytes of text with a simple pattern."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(80)), "utf-8")
    return path
