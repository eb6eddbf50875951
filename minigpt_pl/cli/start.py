"""Where a command starts: the checkpoint file that --run_dir and --ckpt_path name.

How a checkpoint is read, and what a command takes from it, is in `app`.
"""

from pathlib import Path

from minigpt_pl.checkpoint.run_dir import find_checkpoint
from minigpt_pl.cli import errors
from minigpt_pl.cli.options import UserOption
from minigpt_pl.runtime.errors import UserError


def path_option(name: str, given: list[UserOption], command: str) -> str:
    """--run_dir or --ckpt_path, which decide what else is read; "" if not given."""
    matching = [option for option in given if option.name == name]
    errors.check_options(matching, command)
    return next((option.value for option in reversed(matching) if not option.file), "")


def find_start(start: str, run_dir: str, command: str) -> Path | None:
    """The checkpoint file that --ckpt_path, `start`, names; None for a new run of `fit`."""
    if not start and command != "fit":
        remedy = "use --ckpt_path FILE, or --run_dir DIR --ckpt_path best (or last)"
        raise UserError(f"{command} needs a checkpoint", remedy=remedy)
    path = find_checkpoint(start, run_dir) if start else None
    if command == "fit" and start == "best":
        remedy = f"to fork it from its best step, use --ckpt_path {path} --run_dir NEW"
        raise UserError("a run can only be resumed from last", option="ckpt_path", value=start, remedy=remedy)
    return path
