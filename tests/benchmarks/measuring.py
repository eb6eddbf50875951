"""How speed is measured: competitors run in turn, and each result is a median with its range.

The measurements themselves are in `bench_*.py`.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Row:
    """One measurement: the values of each competitor in each round, in `unit`; the first competitor is ours."""

    title: str
    unit: str
    values: dict[str, list[float]]
    note: str = ""

    def lines(self) -> Iterator[str]:
        yield self.title
        ours = next(iter(self.values))
        for name, values in self.values.items():
            median = statistics.median(values)
            line = f"  {name:34}{median:12.4g} {self.unit:9}[{min(values):.4g} ... {max(values):.4g}]"
            if name != ours:
                ratios = [value / our_value for our_value, value in zip(self.values[ours], values, strict=True)]
                line += f"   x {statistics.median(ratios):.3f} of {ours} [{min(ratios):.3f} ... {max(ratios):.3f}]"
            yield line
        if self.note:
            yield f"  {self.note}"


@dataclass
class Report:
    """The measurements of a session."""

    rows: list[Row] = field(default_factory=list)

    def add(self, title: str, unit: str, values: dict[str, list[float]], note: str = "") -> None:
        self.rows.append(Row(title, unit, values, note))
        print("\n" + "\n".join(self.rows[-1].lines()))


def interleaved(competitors: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each competitor in each round; each round runs all of them, so that a slow minute affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(warmup + rounds):
        for name, run in competitors.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "torch": torch.__version__,
    }
