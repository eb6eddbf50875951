"""From a cold start: the first character of predict against `import lightning.pytorch`; the text's way to tokens."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from benchmarks.measuring import Report

from minigpt_pl.__main__ import main
from minigpt_pl.data import TextDataModule

pytestmark = pytest.mark.bench


def seconds_to_first_output(words: list[str]) -> float:
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.read(1)
    seconds = time.perf_counter() - began
    process.stdout.close()
    process.kill()
    process.wait()
    return seconds


def test_predict_from_a_cold_start(report: Report, tmp_path: Path) -> None:
    assert main(["fit", "-c", "smoke", "--run_dir", str(tmp_path / "run"), "--wandb", "null"]) == 0
    predict = ["-m", "minigpt_pl", "predict", "--ckpt_path", str(tmp_path / "run" / "best.ckpt")]
    seconds: dict[str, list[float]] = {"import lightning.pytorch": [], "predict, first character": []}
    for _ in range(6):
        seconds["import lightning.pytorch"].append(
            seconds_to_first_output(["-c", "import lightning.pytorch; print(1)"])
        )
        seconds["predict, first character"].append(seconds_to_first_output(predict))
    report.add("from a cold start", "s", seconds)


def test_big_text(report: Report, tmp_path: Path) -> None:
    letters = np.random.default_rng(1).integers(97, 123, 10**8, dtype=np.uint8)
    letters[::70] = 10
    path = tmp_path / "big.txt"
    path.write_bytes(letters.tobytes())
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        assert TextDataModule(str(path), 128, 16, 100, 1).vocab_size == 27
        TextDataModule(str(path), 128, 16, 100, 1).read()
        seconds.append(time.perf_counter() - began)
    report.add(
        "100 MB of characters to tokens",
        "MB/s",
        {"first start": [100 / seconds[0]], "second start": [100 / seconds[1]]},
    )
