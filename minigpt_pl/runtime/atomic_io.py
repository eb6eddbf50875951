"""Small files that are complete or absent, temporary files of writers that died, and the names of a run's files.

The contents belong to those who write them; how a checkpoint is written is in `checkpoint.io`.
"""

import os
from contextlib import suppress
from pathlib import Path

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, SAMPLES_FILE = "config.yaml", "metrics.csv", "summary.json", "samples.txt"
TENSORBOARD_DIR = "tensorboard"
TEMP_SUFFIX = ".writing"


def atomic_write(path: Path, data: bytes) -> None:
    """Writes a small file completely or not at all; other processes may write it at the same time."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def remove_temp_files(directory: Path) -> None:
    for leftover in directory.glob(f"*{TEMP_SUFFIX}"):
        leftover.unlink()
