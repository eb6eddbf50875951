"""Ctrl-C, SIGTERM, a closed terminal: leave at once, or, while a run trains, note it until the step is whole.

Nothing heavy is imported here: the handlers stand before torch is loaded. Who stops a run is in `stopping`.
"""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from minigpt_pl.runtime.errors import is_rank_zero

SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM] + ([SIGHUP] if SIGHUP else [])

pending_signal: int | None = None
"""The signal that asked a training run to stop, or None."""

exit_hooks: list[Callable[[], None]] = []
"""Called when a signal ends the process at once: what would be left half-made goes, and so do its other processes."""

deferring = False
"""Whether a training run is under way, which stops at the end of a step."""

_owner: int | None = None


def _handle(number: int, frame: FrameType | None) -> None:
    global pending_signal
    if os.getpid() != _owner:
        return  # a forked worker, which Ctrl-C reaches too: its parent decides
    if deferring and pending_signal is None:
        pending_signal = number
        if is_rank_zero():
            with suppress(OSError):  # print() may be where the signal struck, and cannot be entered twice
                os.write(2, b"\nstopping after this step and its check; once more stops at once\n")
        return
    exit_now(number)


def exit_now(number: int) -> None:
    """Ends the process without unwinding: torch and wandb may be anywhere, and swallow exceptions."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    for clean in exit_hooks:
        clean()
    os._exit(128 + number)


def install_handlers() -> None:
    """Sets our handlers: the first thing that `main` does."""
    global _owner
    _owner = os.getpid()
    for stop in STOP_SIGNALS:
        if stop != SIGHUP or signal.getsignal(stop) != signal.SIG_IGN:  # as nohup has it
            signal.signal(stop, _handle)


def ignore_in_worker(worker: int) -> None:
    """For a data loader's worker, which a signal to the whole group reaches too: it ends when its parent does."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)


def defer(wanted: bool) -> None:
    """From now on the first signal is only noted, and a second one ends the process; or no longer."""
    global pending_signal, deferring
    pending_signal, deferring = None, wanted
