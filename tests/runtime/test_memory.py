"""Freed memory stays with the process, so that a training step does not ask Linux for it again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from minigpt_pl.runtime.memory import keep_freed_memory

FAULTS = """
import resource, sys
from minigpt_pl.__main__ import main

if sys.argv[1:]:
    assert main(sys.argv[1:]) == 0
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        b'x' * 2**27
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""  # 4 strings of 128 MiB, after 4 others: 131,072 pages of 4 KiB, unless they are there already


def page_faults(folder: Path, *args: str, **env: str) -> int:
    (folder / "text.txt").write_text("the sea is calm\n" * 100, "utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", **env}
    words = [sys.executable, "-c", FAULTS, *args]
    output = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr
    return int(output.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_command_keeps_what_it_frees(tmp_path: Path) -> None:
    fit = (
        "fit", "-c", "smoke", "--wandb", "null", "--samples", "null", "--model.n_embd", "16", "--model.n_layer", "1",
        "--model.block_size", "16", "--data.batch_size", "4", "--data.path", "text.txt", "--trainer.max_steps", "2",
        "--data.eval_every", "2", "--run_dir", "run",
    )  # fmt: skip
    assert page_faults(tmp_path) > 50_000
    assert page_faults(tmp_path, *fit) < 5_000


def test_the_users_own_settings_of_malloc_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000")
    assert not keep_freed_memory()
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()
