"""Standard output and error of any kind: in an old encoding, closed, or on a full disk.

What is printed, and by whom, belongs to those who print it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from minigpt_pl.runtime.errors import rank_zero_print


def protect_output() -> None:
    """Makes printing work whatever the terminal knows: a character that it lacks becomes a question mark.

    A stream that was closed becomes the null device. Otherwise the next file that is opened would have its number, and
    what a library prints would be written into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # until the process ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def stdout_problem() -> OSError | None:
    """Why what was printed cannot be written; None if it can."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def discard_stdout() -> None:
    """Sends what is still to be printed nowhere: Python would fail again on it when it exits."""
    with suppress(OSError, ValueError):  # a stream without a file, as in a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def report_of_finished_work() -> Iterator[None]:
    """Around the last prints of work whose files are written: it stays finished when nobody can read of it."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        discard_stdout()
        if not isinstance(error, BrokenPipeError):  # whoever closed a pipe does not want it
            rank_zero_print(f"all is done, but its report could not be printed ({error.strerror})")
