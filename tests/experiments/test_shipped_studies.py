"""The study files in configs/studies: each can be found by its name, and each of its runs is a valid `fit`."""

from pathlib import Path

import pytest
from conftest import PROJECT

from minigpt_pl.experiments.spec import find_study, read_study, resolve_config
from minigpt_pl.runtime.errors import UserError


def test_a_name_can_be_that_of_a_shipped_study() -> None:
    assert find_study("journey") == PROJECT / "configs" / "studies" / "journey.yaml"
    with pytest.raises(UserError, match="did you mean journey"):
        find_study("jurney")


@pytest.mark.e2e
@pytest.mark.parametrize("path", sorted(PROJECT.glob("configs/studies/*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_study_can_be_run(path: Path) -> None:
    study = read_study(path)
    for variant in study.variants.values():
        resolve_config(variant.args)
    assert study.comparisons
    assert study.content["description"]
