"""Which code made a run: the commit of the package and the versions in summary.json. Its metrics are in test_fit."""

import importlib.metadata
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from support.runs import OFF, SIZES, summary

from minigpt_pl.training import summary as summary_module


def test_git_commit_is_that_of_the_package_not_of_a_surrounding_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        person = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *person, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    package = tmp_path / "site-packages" / "minigpt_pl"
    package.mkdir(parents=True)
    (package / "summary.py").write_text("")
    monkeypatch.setattr(summary_module, "__file__", str(package / "summary.py"))
    assert summary_module.git_commit() is None
    git("init")
    git("commit", "--allow-empty", "--message", "of somebody else")
    assert summary_module.git_commit() is None
    git("add", ".")
    git("commit", "--message", "its own")
    commit = git("rev-parse", "HEAD").strip()
    assert summary_module.git_commit() == commit
    (package / "summary.py").write_text("changed")
    assert summary_module.git_commit() == f"{commit}-dirty"


def test_a_package_that_is_not_installed_has_no_version_and_trains(
    minigpt: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "minigpt_pl":
            raise PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr(summary_module, "version", version)
    assert minigpt("fit", *SIZES, *OFF, "--trainer.max_steps", 1, "--run_dir", tmp_path / "run").status == 0
    versions = summary(tmp_path / "run")["versions"]
    assert (versions["minigpt_pl"], versions["torch"]) == ("not installed", torch.__version__)
