"""minigpt_pl: a laboratory for small language models.

From Python: the LightningModules, the LightningDataModule, and three functions for a trained checkpoint. They are
imported when they are first used, so that `import minigpt_pl` costs nothing (PEP 562).
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "ClassicLM": "minigpt_pl.training.lit_modules",
    "ModernLM": "minigpt_pl.training.lit_modules",
    "AblationLM": "minigpt_pl.training.lit_modules",
    "LanguageModel": "minigpt_pl.training.lit_modules",
    "TextDataModule": "minigpt_pl.data.datamodule",
    "exact_training": "minigpt_pl.training.exact",
    "load_checkpoint": "minigpt_pl.api",
    "generate": "minigpt_pl.api",
    "score": "minigpt_pl.api",
}
__all__ = [
    "ClassicLM", "LanguageModel", "ModernLM", "TextDataModule", "exact_training", "generate", "load_checkpoint",
    "score",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
