"""Speed: each figure with its rival in the same run, interleaved; a table at the end, and JSON on request.

`pytest -m bench` on a quiet machine; `--nanogpt DIR` names a checkout of nanoGPT to measure against, `--json FILE`
keeps the figures. Nothing here asserts a time: ratios are for people to read.
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
    parser.addoption("--json", type=Path, help="where to keep the figures")


@pytest.fixture(scope="session")
def report(one_thread: None) -> Report:
    """Where figures are added; speed is measured with every core that this process may use, unlike the tests."""
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
    terminalreporter.section("figures: median [lowest ... highest]")
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in machine().items()))
    for row in _report.rows:
        terminalreporter.write_line(row.what)
        for line in [*row.lines(), *([f"  {row.note}"] if row.note else [])]:
            terminalreporter.write_line(line)
    if path := config.getoption("--json"):
        path.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in _report.rows]}, indent=1))
