"""W&B's own environment variables, by the option of `WandbConfig` that each one stands for.

How strong they are beside files and flags is in `cli.environment`. W&B itself reads all others, such as WANDB_API_KEY.
"""

import os

from minigpt_pl.runtime.errors import UserError

VARIABLES = {
    "offline": "WANDB_MODE", "project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP", "job_type": "WANDB_JOB_TYPE", "tags": "WANDB_TAGS",
}  # fmt: skip
OFFLINE = {"online": False, "run": False, "offline": True, "dryrun": True}
"""The value of wandb.offline for each mode of W&B that is not `disabled`."""
HIDDEN = ("WANDB_MODE", "WANDB_DISABLED", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_TAGS")
"""Hidden from W&B during a run: options stand for them, and W&B would keep them for the next run of the process.

The agent of a sweep gives its runs the others, and W&B then ignores the options.
"""


def read_variables() -> dict[str, str]:
    """The texts of the variables that are set, by option; an empty one counts as not set, and so does `disabled`.

    Raises:
        UserError: If W&B has no such mode.
    """
    found = {name: text for name, variable in VARIABLES.items() if (text := os.environ.get(variable))}
    if (mode := found.get("offline", "disabled")) == "disabled":
        found.pop("offline", None)
    elif mode not in OFFLINE:
        raise UserError(f"WANDB_MODE {mode} in the environment: it must be online, offline or disabled")
    return found


def is_disabled() -> bool:
    """Whether the environment turns W&B off."""
    flag = os.environ.get("WANDB_DISABLED", "").lower()
    return flag in ("true", "1", "yes", "on") or os.environ.get("WANDB_MODE") == "disabled"
