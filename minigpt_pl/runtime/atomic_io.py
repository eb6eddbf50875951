"""Files that are whole or not there: written beside their place and renamed, and what a writer that died has left.

What stands in them is the matter of those who write them; a checkpoint is written in `checkpoint`.
"""

import os
from contextlib import suppress
from pathlib import Path

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, SAMPLES_FILE = "config.yaml", "metrics.csv", "summary.json", "samples.txt"
"""In a run's directory, beside its checkpoints; the first three in its results folder too."""
TEMP_SUFFIX = ".writing"
"""At the end of the name of what is being written."""


def atomic_write(path: Path, data: bytes) -> None:
    """Writes a small file whole or not at all; other processes may write it too."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def remove_temp_files(folder: Path) -> None:
    """Removes what a writer that died has left half-written."""
    for leftover in folder.glob(f"*{TEMP_SUFFIX}"):
        leftover.unlink()
