"""Cold starts: predict until its first character, against `import lightning.pytorch`; and a fit on a text of 1 GB."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks.measuring import Report

from minigpt_pl.__main__ import main

pytestmark = pytest.mark.bench


def seconds_to_first_output(args: list[str]) -> float:
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.read(1)
    seconds = time.perf_counter() - start
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


GIGABYTE = 10**9
PEAK = "import resource, sys; from minigpt_pl.__main__ import main; status = main(sys.argv[1:]); "
PEAK += "used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]; "
PEAK += "print('peak', max(used)); sys.exit(status)"


def big_text(path: Path, size: int) -> None:
    """Repeats the shipped text, each time below another number."""
    text = Path("data/input.txt").read_bytes()
    with path.open("wb") as file:
        for number in range(-(-size // len(text))):
            file.write(b"%d\n" % number + text)
        file.truncate(size)


def measure_fit(path: Path, run_dir: Path) -> tuple[float, float, str]:
    """Seconds of a fit of three steps, MB of memory of its largest process, and its stderr."""
    args = ["fit", "--data.path", str(path), "--run_dir", str(run_dir), "--trainer.max_steps", "3"]
    args += ["--data.max_eval_tokens", "10000", "--wandb", "null", "--samples", "null"]
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", PEAK, *args], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    return seconds, int(process.stdout.split("peak")[1]) / 1000, process.stderr


def test_big_text(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    big = tmp_path / "big.txt"
    big_text(big, GIGABYTE)
    try:
        small = measure_fit(Path("data/input.txt"), tmp_path / "small")
        first = measure_fit(big, tmp_path / "first")
        assert "tokenizing" in first[2], "no progress bar was shown"
        seconds: dict[str, list[float]] = {"1 GB, second start": [], "shipped text, second start": []}
        for turn in range(3):
            seconds["shipped text, second start"].append(measure_fit(Path("data/input.txt"), tmp_path / f"s{turn}")[0])
            seconds["1 GB, second start"].append(measure_fit(big, tmp_path / f"b{turn}")[0])
    finally:
        big.unlink()
        shutil.rmtree(tmp_path / "cache")
    rate = GIGABYTE / 1e6 / (first[0] - min(seconds["1 GB, second start"]))
    report.add("characters to tokens, two passes over 1 GB", "MB/s", {"fit": [rate]}, f"first start {first[0]:.0f} s")
    report.add("peak memory of that fit", "MB", {"1 GB": [first[1]], "shipped text": [small[1]]})
    report.add("a fit of three steps from a cold start", "s", seconds)
