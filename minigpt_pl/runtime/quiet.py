"""What libraries print or warn of without need: hidden before a command starts."""

import logging
import warnings


def silence_libraries() -> None:
    """Hides advertisements, lists of devices, and advice that does not apply to this project."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("matplotlib").setLevel(
        logging.ERROR
    )  # torchmetrics imports it; a home it cannot write is no news
    for asked_for in ("profilers.profiler", "callbacks.model_summary"):
        logging.getLogger(f"lightning.pytorch.{asked_for}").setLevel(logging.INFO)
    for advice in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*exists and is not empty.*",
        ".*functional.all_gather is deprecated.*",
        ".*smaller than the logging interval.*",
        ".*predict returned None.*",
        ".*Trying to infer the `batch_size`.*",
        ".*infer the batch indices.*",
    ):
        warnings.filterwarnings("ignore", advice)
