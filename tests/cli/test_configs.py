"""The shipped configs: each one runs, in any order; each value is written once; recipes stay within their budgets.

What an option does is tested in its room; the reference report's runs are tested in test_journey.
"""

import inspect
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from support.configs import CONFIGS, JOURNEY, build, config, resolve, resolved_leaves

from minigpt_pl.cli.options import flatten
from minigpt_pl.data.config import DataConfig
from minigpt_pl.training.lit_modules import LanguageModelConfig, ModernLM, ModernLMConfig
from minigpt_pl.training.sampling import SampleCallback
from minigpt_pl.training.stopping import ValLossEarlyStopping

AXES = ("classic", "modern", "moe", "bpe", "smoke")
RECIPES = ("laptop", "shakespeare", "saltmarsh")
SECONDS = (
    "--model.n_layer", 1, "--model.n_head", 2, "--model.n_embd", 8, "--model.block_size", 16, "--data.batch_size", 2,
    "--trainer.max_steps", 2, "--data.max_eval_tokens", 64, "--wandb", "null",
)  # fmt: skip
"""Options with which a run of any config takes less than a second."""

MiniGPT = Callable[..., Outcome]


# Every config runs.


@pytest.mark.parametrize(
    "name", ["default", *AXES, *(f"journey/{run}" for run in JOURNEY), *(f"recipes/{run}" for run in RECIPES)]
)
def test_a_config_runs(minigpt: MiniGPT, tmp_path: Path, text_file: Path, name: str) -> None:
    done = minigpt("fit", "-c", name, *SECONDS, "--data.path", text_file, "--run_dir", tmp_path / "run")
    assert done.status == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["stop_reason"], summary["total_steps"]) == ("completed", 2)


@pytest.mark.parametrize("pair", list(combinations(AXES, 2)), ids="-".join)
def test_two_configs_work_in_either_order(pair: tuple[str, str]) -> None:
    """Different axes commute; of one axis the last config wins."""
    build(*pair)
    if set(pair) <= {"classic", "modern", "moe"}:
        for names in (pair, pair[::-1]):
            both, alone = resolved_leaves(*names), resolved_leaves(names[-1])
            unused = {"model.init_args.moe_aux_loss_coef"} if names[-1] == "modern" else set()  # a dense model
            assert {name for name in both if both[name] != alone[name]} <= unused
    else:
        assert resolved_leaves(*pair) == resolved_leaves(*reversed(pair))


# A value is written once.


def test_no_value_stands_both_in_the_code_and_in_default_yaml() -> None:
    owners = {
        "model.init_args": [LanguageModelConfig, ModernLMConfig],
        "data": [DataConfig],
        "early_stopping": [ValLossEarlyStopping],
        "samples": [SampleCallback],
    }
    twice = []
    for name, _ in flatten(config("default")):
        group, _, key = name.rpartition(".")
        for owner in owners.get(group, []):
            parameters = inspect.signature(owner).parameters
            assert key in parameters, f"{name} is no option of {owner.__name__}"
            twice += [name] * (parameters[key].default is not inspect.Parameter.empty)
    assert not twice


@pytest.mark.parametrize("name", AXES)
def test_a_config_holds_only_differences(name: str) -> None:
    leaves = resolved_leaves(name)
    others = [resolved_leaves(other) for other in (*AXES[:3], "default") if other != name]
    for leaf, value in flatten(config(name)):
        if leaf != "model.class_path":  # named also where it is the default's, so that every order works
            assert any(other.get(leaf) != leaves[leaf] for other in others), f"{leaf}: {value} changes nothing"


# What each recipe may use.


@pytest.mark.parametrize(
    ("name", "most_parameters", "most_tokens"),
    [("laptop", 820_000, 1_536_000), ("shakespeare", 10_700_000, 5000 * 64 * 256)],
)
def test_a_recipe_stays_within_its_budget(name: str, most_parameters: int, most_tokens: int) -> None:
    resolved = resolve(f"recipes/{name}")
    sizes, trainer = resolved["model"]["init_args"], resolved["trainer"]
    tokens = trainer["max_steps"] * trainer["accumulate_grad_batches"] * resolved["data"]["batch_size"]
    assert tokens * sizes["block_size"] <= most_tokens
    with torch.device("meta"):
        net = ModernLM(**{**sizes, "vocab_size": 65}).net  # tiny Shakespeare's
    assert net.params_active() <= most_parameters


def test_every_recipe_is_tested() -> None:
    assert sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml")) == sorted(RECIPES)
