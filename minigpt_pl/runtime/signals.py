"""Ctrl-C, SIGTERM and a closed terminal: they end the process at once, or a training run after its current step.

Nothing heavy is imported here: the handlers are set before torch is loaded. Who stops a run is in `training.stopping`.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from minigpt_pl.runtime.errors import is_rank_zero

SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM] + ([SIGHUP] if SIGHUP else [])

pending_signal: int | None = None
"""The signal that asked a training run to stop, or None."""
exit_hooks: list[Callable[[], None]] = []
"""Called before a signal ends the process: they remove unfinished files and end other processes."""
deferring = False
"""Whether a training run is under way, which stops at the end of a step."""
_owner: int | None = None  # process id


def _handle(number: int, frame: FrameType | None) -> None:
    global pending_signal
    if os.getpid() != _owner:
        return  # a forked worker receives Ctrl-C too, and leaves the decision to its parent
    if not deferring or pending_signal is not None:
        exit_now(number)
    pending_signal = number
    if is_rank_zero():
        with suppress(OSError):  # not print(): the signal may have interrupted one
            os.write(2, b"\nstopping after this step and its evaluation; a second signal stops at once\n")


def exit_now(number: int) -> None:
    """Ends the process without unwinding the stack: torch and wandb may be on it, and they swallow exceptions."""
    ignore_signals()
    for clean_up in exit_hooks:
        clean_up()
    os._exit(128 + number)


def install_handlers() -> None:
    """Sets the handlers; `main` calls it first."""
    global _owner
    _owner = os.getpid()
    for number in STOP_SIGNALS:
        if number != SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, _handle)


def ignore_signals(worker: int = 0) -> None:
    """Also for a data loader's worker: a signal to the process group reaches it too, but it ends with its parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def defer(wanted: bool) -> None:
    """While `wanted`, the first signal is only recorded, and a second one ends the process."""
    global pending_signal, deferring
    pending_signal, deferring = None, wanted


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in it, for a command that continues afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
