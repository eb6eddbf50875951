"""The pytest plugin of the benchmarks: fixtures, options, the table at the end, and JSON on request.

Run `pytest -m bench` on a quiet machine. `--nanogpt DIR` names a checkout of nanoGPT to measure against, and `--json
FILE` saves the results. No benchmark asserts a time.
"""

import importlib
import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.measuring import Report, machine

_report = Report()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nanogpt", type=Path, help="a checkout of nanoGPT to measure against")
    parser.addoption("--json", type=Path, help="the file to save the results in")


@pytest.fixture(scope="session")
def report(one_thread: None) -> Report:
    """Collects the results; unlike the tests, benchmarks use every core that this process may use."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return _report


@pytest.fixture
def nanogpt(request: pytest.FixtureRequest) -> Any:
    """nanoGPT's model.py as a module, or None."""
    folder = request.config.getoption("--nanogpt")
    if folder is None:
        return None
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hugging_face() -> Any:
    """The transformers package, or None."""
    return importlib.import_module("transformers") if importlib.util.find_spec("transformers") else None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _report.rows:
        return
    terminalreporter.section("results: median [lowest ... highest]")
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in machine().items()))
    for row in _report.rows:
        for line in row.lines():
            terminalreporter.write_line(line)
    if path := config.getoption("--json"):
        path.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in _report.rows]}, indent=1))
