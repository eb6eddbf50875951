"""How speed is measured: rivals take turns, medians are quoted with their spread, and the machine is named."""

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
    """One figure: values of each rival, round by round, in `unit`; the first rival is ours."""

    what: str
    unit: str
    values: dict[str, list[float]]
    note: str = ""

    def lines(self) -> Iterator[str]:
        ours = next(iter(self.values))
        for name, values in self.values.items():
            middle = statistics.median(values)
            line = f"  {name:34}{middle:12.4g} {self.unit:9}[{min(values):.4g} ... {max(values):.4g}]"
            if name != ours:
                ratios = [theirs / mine for mine, theirs in zip(self.values[ours], values, strict=True)]
                line += f"   x {statistics.median(ratios):.3f} of {ours} [{min(ratios):.3f} ... {max(ratios):.3f}]"
            yield line


@dataclass
class Report:
    """Collects the figures of a session."""

    rows: list[Row] = field(default_factory=list)

    def add(self, what: str, unit: str, values: dict[str, list[float]], note: str = "") -> None:
        self.rows.append(Row(what, unit, values, note))
        print("\n" + "\n".join([what, *self.rows[-1].lines()] + ([f"  {note}"] if note else [])))


def interleaved(rivals: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each rival in each round; in a round all take their turn, so that a slow minute strikes all."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(warmup + rounds):
        for name, run in rivals.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
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
