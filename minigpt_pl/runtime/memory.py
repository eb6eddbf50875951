"""Keeps memory that was freed for the next request, instead of a return to Linux and a new request in each step.

It belongs to the process, so commands call it and the library does not.
"""

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed; returns whether it does.

    By default it gives large blocks back, and a training step asks for the same blocks again, page by page. Nothing is
    done with another C library (macOS, Windows, musl), or where the user has tuned malloc by its own variables.
    """
    tuned = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if tuned or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, NEVER))
