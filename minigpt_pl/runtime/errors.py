"""Errors that are not bugs, how they are told in one line, and which process tells them.

No error is caught here: `__main__` turns them into exit statuses.
"""

import os
import sys
from contextlib import suppress
from typing import Any


class UserError(ValueError):
    """The user's input or machine is at fault: one line on stderr, exit status 2.

    Args:
        problem: What is wrong, such as "it must be at least 1".
        option: The dotted name of the option that is at fault, or "".
        value: The option's value.
        remedy: What the user can do, or "".
    """

    def __init__(self, problem: str, *, option: str = "", value: Any = None, remedy: str = ""):
        super().__init__(problem)
        self.problem, self.option, self.value, self.remedy = problem, option, value, remedy

    def __str__(self) -> str:
        value = "" if self.value is None else f" {self.value}"
        return self.format(f"{self.option}{value}" if self.option else "")

    def format(self, subject: str) -> str:
        """The whole message; `subject` is the option with its value, as the user typed it, or ""."""
        message = f"{subject}: {self.problem}" if subject else self.problem
        return f"{message}; {self.remedy}" if self.remedy else message


class DivergenceError(RuntimeError):
    """The loss, the gradient or a weight is no longer a finite number: exit status 3."""


def is_rank_zero() -> bool:
    """Whether this is the process that the user started, or the first of those that torchrun or SLURM started."""
    return not any(int(os.environ.get(name) or 0) for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK"))


def rank_zero_print(*lines: str | None) -> None:
    """Prints lines on stderr, in the first process only."""
    for message in filter(None, lines if is_rank_zero() else ()):
        with suppress(OSError):  # nobody can read it: the terminal is closed, or the disk of a log is full
            print(message, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join((str(error) or type(error).__name__).split())
