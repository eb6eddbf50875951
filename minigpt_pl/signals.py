"""What Ctrl-C and SIGTERM do: leave at once, or, while a run trains, be noted until the step is whole.

Nothing heavy is imported here: the handlers stand before torch is loaded. Who stops a run is in `callbacks`.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)

noted: int | None = None
"""The signal that asked a training run to stop, or None."""

before_leaving: list[Callable[[int], None]] = []
"""Called with the signal's number when it ends the process at once: what would be left half-made goes."""

deferring = False
"""Whether a training run is under way, which stops at the end of a step."""


def _handle(number: int, frame: FrameType | None) -> None:
    global noted
    if deferring and noted is None:
        noted = number
        print("\nstopping after this step; once more stops at once", file=sys.stderr)
        return
    leave_at_once(number)


def leave_at_once(number: int) -> None:
    """Ends the process without unwinding: torch and wandb may be anywhere, and swallow exceptions."""
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
    for clean in before_leaving:
        clean(number)
    os._exit(128 + number)


def install() -> None:
    """Sets our handlers; called on the first line of `main` and again where Lightning has set its own."""
    for stop in STOPS:
        signal.signal(stop, _handle)


def defer(wanted: bool) -> None:
    """From now on the first signal is only noted, and a second one ends the process; or no longer."""
    global noted, deferring
    noted = None if wanted else noted
    deferring = wanted
