"""minigpt_pl: a laboratory for small language models. From Python: `load_checkpoint`, `generate`, `score`."""

from typing import Any

__all__ = ["generate", "load_checkpoint", "score"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from minigpt_pl import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
