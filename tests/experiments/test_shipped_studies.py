"""The study files in configs/studies: each can be found by its name, and each of its runs is a valid `fit`."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

from minigpt_pl.experiments.results import read_results, run_differences
from minigpt_pl.experiments.spec import find_study, for_seed, read_study, resolve_config
from minigpt_pl.runtime.errors import UserError


def test_a_name_can_be_that_of_a_shipped_study() -> None:
    assert find_study("journey") == PROJECT / "configs" / "studies" / "journey.yaml"
    with pytest.raises(UserError, match="did you mean journey"):
        find_study("jurney")


@cache
def config_of(*args: str) -> dict[str, Any]:
    return resolve_config(list(args))


@pytest.mark.e2e
@pytest.mark.parametrize("path", sorted(PROJECT.glob("configs/studies/*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_study_can_be_run_and_its_stored_results_are_of_the_same_runs(path: Path) -> None:
    study = read_study(path)
    for variant in study.variants.values():
        config_of(*for_seed(variant.args, variant.first_seed))
    for result in read_results(PROJECT / "docs/results" / path.stem):
        args = for_seed(study.variants[result.name].args, result.seed)
        now = config_of(*args) | {"seed_everything": result.seed}
        assert not [*run_differences(result.config, now)], f"{result}: more seeds could not be added"
    assert study.comparisons
    assert study.content["description"]
