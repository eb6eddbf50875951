"""The process of a study's run: the command line of `minigpt`, stopped when the process that started it has died.

A worker of a cluster can be killed at any time. Its run must not train on: another worker resumes it.
"""

import os
import runpy
import signal
import threading


def stop_with_parent() -> None:
    """Sends this process SIGTERM when its stdin ends: a pipe whose other end only the parent has open."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    stop_with_parent()
    runpy.run_module("minigpt_pl", run_name="__main__", alter_sys=True)
