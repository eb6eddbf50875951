"""What the tests of configs share: fits that are built or resolved from shipped configs, but not started."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import yaml
from conftest import PROJECT
from lightning.pytorch import LightningModule

from minigpt_pl.cli.app import MiniGPTCLI
from minigpt_pl.cli.options import flatten
from minigpt_pl.runtime.quiet import silence_libraries

CONFIGS = PROJECT / "configs"
JOURNEY = (
    "classic_baseline", "classic_tuned", "p2_refine", "modern_dense", "modern_dense_control", "modern_moe",
    "modern_moe_tuned", "modern_moe_char_01", "modern_moe_char_02", "bpe_test", "bpe_improved", "p2_lr1p5e4_refine",
    "p3_lr1e4", "p4_med192",
)  # fmt: skip


class Built(MiniGPTCLI):
    """A fit that is built, but not started."""

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        pass


class Parsed(MiniGPTCLI):
    """The configuration of a fit that is not built."""

    def instantiate_classes(self) -> None:
        raise StopIteration(self.resolved)


def with_configs(*names: str) -> list[str]:
    return [arg for name in names for arg in ("-c", name)]


def build(*names: str, options: Sequence[str] = ()) -> Built:
    silence_libraries()
    return Built("fit", [*with_configs(*names), *options])


def resolve(*names: str) -> dict[str, Any]:
    with pytest.raises(StopIteration) as stop:
        Parsed("fit", with_configs(*names))
    return stop.value.value


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text("utf-8"))


@cache
def resolved_leaves(*names: str) -> dict[str, Any]:
    return dict(flatten(resolve(*names)))
