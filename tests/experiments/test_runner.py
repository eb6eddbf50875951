"""A study: what its file may say, which runs it plans, that runs end up in their results folders, or are said to fail.

Runs that stand ready are made in this process; where it matters, they are processes of their own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import PROJECT, Outcome
from support.runs import differences

from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.experiments import results, runner
from minigpt_pl.experiments.spec import Study, find_study, plan, read_study, resolve_config
from minigpt_pl.experiments.statistics import MIN_SEEDS_COMPARISON
from minigpt_pl.runtime.errors import UserError

MiniGPT = Callable[..., Outcome]
SMALL = "-c smoke --samples null --wandb null --model.n_embd 16 --trainer.enable_progress_bar false"


@pytest.fixture
def place(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with text.txt."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(**content: object) -> Path:
    path = Path("trial.yaml")
    path.write_text(yaml.safe_dump({"base_args": f"{SMALL} --data.path text.txt", **content}, sort_keys=False), "utf-8")
    return path


def planned(path: Path, seeds: int | None = None, only: tuple[str, ...] = ()) -> list[str]:
    return [str(run) for run in plan(read_study(path), Path("out"), Path("runs"), seeds, list(only))]


# The file and its plan.


def test_seeds_go_round_and_named_comparisons_get_more(place: Path) -> None:
    path = write(runs={"a": "", "b": "--model.n_layer 1", "c": {"fit": "", "first_seed": 9}}, comparisons=["b - a"])
    assert planned(path, seeds=2) == ["a-1337", "b-1337", "c-9", "a-1338", "b-1338", "c-10"]
    assert planned(path, seeds=1, only=("c", "a", "c")) == ["c-9", "a-1337"]
    names = planned(path)
    assert sum(name.startswith("a-") for name in names) == MIN_SEEDS_COMPARISON == 8
    assert sum(name.startswith("c-") for name in names) == 5
    assert len(planned(write(runs={"a": ""}, seeds=3))) == 3
    first, second = plan(read_study(write(runs={"a": "--model.n_layer 1"}, seeds=2)), Path("o"), Path("r"), None, [])
    assert (first.settings["seed_everything"], second.settings["seed_everything"]) == (1337, 1338)
    assert first.settings["model"]["init_args"]["n_layer"] == 1
    with pytest.raises(UserError, match="--only nix: the study has a"):
        plan(read_study(path), Path("o"), Path("r"), None, ["nix"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "it needs runs"),
        ({"runs": {}}, "it needs runs"),
        ({"runs": {"a": ""}, "compare": []}, "compare: it may hold"),
        ({"runs": {"a": {"fit": "", "first_seed": "x"}}}, "runs: a: first_seed is x: it must be a number"),
        ({"runs": {"a": {"fit": "", "first_seed": -1}}}, "runs: a: first_seed is -1: it must be a number"),
        ({"runs": {"a": "--data.path it's.txt"}}, "--data.path it's.txt cannot be cut into words"),
        ({"runs": {"a": "", "b": ""}, "comparisons": 5}, "comparisons is 5: it must be a list"),
        ({"runs": {"a b": ""}}, "runs: a b is no name"),
        ({"runs": {"a": ["x"]}}, "runs: a: give the options of fit"),
        ({"runs": {"a": "", "b": ""}, "comparisons": ["a against b"]}, "such as a - b"),
        ({"runs": {"a": "", "b": ""}, "comparisons": ["a - c"]}, "a - c: write the names of two runs"),
        ({"runs": {"a": "", "b": ""}, "comparisons": ["a - b"] * 7}, "7 comparisons are named"),
        ({"runs": {"a": ""}, "seeds": 0}, "seeds is 0"),
    ],
)
def test_a_file_that_is_no_study_is_refused(place: Path, minigpt: MiniGPT, content: dict, said: str) -> None:
    done = minigpt("study", write(**content))
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not Path("docs").exists()


@pytest.mark.parametrize("option", ["--out", "--run_dir"])
def test_a_place_that_cannot_be_one_is_told_in_a_line(place: Path, minigpt: MiniGPT, option: str) -> None:
    Path("file").write_text("here")
    done = minigpt("study", write(runs={"a": ""}), option, "file", "--seeds", 1)
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith("error: file")
    assert Path("file").read_text() == "here"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--model.lrr 1", "run a: --model.lrr 1: there is no such setting"),
        ("--seed_everything 3", "run a: --seed_everything 3: a study decides it"),
        ("--run_dir x", "a study decides it"),
        ("--data.path nix.txt", "run a: data.path nix.txt does not exist"),
    ],
)
def test_a_run_that_cannot_be_is_told_before_any_begins(place: Path, minigpt: MiniGPT, line: str, said: str) -> None:
    done = minigpt("study", write(runs={"good": "", "a": line}))
    assert done.status == 2
    assert said in done.err
    assert not Path("runs").exists()


def test_a_name_is_sought_among_the_shipped_studies(place: Path) -> None:
    assert find_study("journey") == PROJECT / "configs" / "studies" / "journey.yaml"
    with pytest.raises(UserError, match="did you mean journey"):
        find_study("jurney")


@pytest.mark.parametrize("path", sorted(PROJECT.glob("configs/studies/*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_study_can_be_run(path: Path) -> None:
    found = read_study(path)
    for configuration in found.configurations.values():
        resolve_config(configuration.words)
    assert found.comparisons
    assert found.content["description"]


# Runs.


def ready(minigpt: MiniGPT, found: Study, name: str, seed: int) -> Path:
    """A run that has been trained where the study would train it."""
    run_dir = Path("runs", found.name, f"{name}-{seed}")
    words = found.configurations[name].words
    done = minigpt("fit", *words, "--seed_everything", seed, "--run_dir", run_dir)
    assert done.status == 0, done.err
    return run_dir


def test_a_run_that_has_ended_leaves_its_results(place: Path, minigpt: MiniGPT) -> None:
    bpe = "--data.tokenizer bpe --data.bpe_vocab_size 50 --model.block_size 16"
    path = write(runs={"char": "", "bpe": f"{bpe} --data.path {place / 'text.txt'}"}, seeds=1)
    for name in ("char", "bpe"):
        ready(minigpt, read_study(path), name, 1337)
    done = minigpt("study", path)
    assert done.status == 0, done.err
    assert "[2/2] bpe-1337 had ended" in done.out
    char, bpe = (results.Result(Path(f"docs/results/trial/runs/{name}-1337")) for name in ("char", "bpe"))
    for result in (char, bpe):
        files = {file.name: file.stat().st_size for file in result.folder.iterdir()}
        assert set(files) == {"config.yaml", "summary.json", "metrics.csv", "nats.npz", "sample.txt"}
        assert sum(files.values()) <= 150_000
        for file in set(files) - {"nats.npz"}:
            assert str(place) not in (result.folder / file).read_text("utf-8"), file
        # its nats are those of the best check
        nats = result.scores.nats.astype(float)
        best, per_character = result.summary["best_val"], result.summary["best_nats_per_char"]
        rounding = float(np.spacing(np.float16(best))) / 4  # a mean of many is closer than each is
        assert nats.mean() == pytest.approx(best, abs=rounding)
        assert nats.sum() / result.scores.lengths.sum() == pytest.approx(per_character, abs=rounding)
        assert np.nanmean(result.scores.by_character()) == pytest.approx(per_character, abs=rounding)
        assert result.figures("val")["step"].tolist() == [10, 20]
        assert result.figures("train")["step"].tolist() == [10, 20]
        assert result.figures("val")["val/loss"].min() == pytest.approx(result.summary["best_val"], rel=1e-5)
        assert len(result.sample) > 100
        assert f"--seed_everything {result.seed}" in result.summary["command"]
    assert bpe.settings["data"]["path"] == "text.txt"
    assert "--data.path text.txt --seed" in bpe.summary["command"]
    assert str(place) not in Path("docs/results/trial/runner.yaml").read_text("utf-8")
    assert char.batches() != bpe.batches()
    seen = char.batches()
    char.settings["data"]["order"] = "epoch"
    assert char.batches() != seen
    del char.settings["data"]["order"]  # results from before there was a choice were drawn
    assert char.batches() == seen
    # both are of the same characters, wherever windows begin
    text = Path("text.txt").read_text()
    validated = text[int(0.9 * len(text)) :]
    assert len(char.scores.by_character()) == len(bpe.scores.by_character()) == len(validated)
    data = TextDataModule("text.txt", 16, 1, 1, tokenizer="bpe", bpe_vocab_size=50)
    pieces = [data.tokenizer.vocabulary[i] for i in data.tokens("val")]
    assert "".join(pieces) == validated
    place_of_third = len("".join(pieces[:2]))
    by_character = bpe.scores.by_character()
    assert np.isnan(by_character[: len(pieces[0])]).all()
    assert by_character[place_of_third] == bpe.scores.nats[1].astype(float) / len(pieces[2])
    assert bpe.scores.by_position().shape == (16,)
    floors = json.loads(Path("docs/results/trial/baselines.json").read_text())
    assert floors["baselines"]["unigram"]["nats_per_char"] > floors["baselines"]["4-gram"]["nats_per_char"]


def test_what_has_results_is_done_and_what_differs_is_not_taken_for_it(place: Path, minigpt: MiniGPT) -> None:
    """A clean clone has the results and no run directories."""
    path = write(runs={"a": "", "b": "--model.n_layer 1"}, comparisons=["b - a"])
    ready(minigpt, read_study(path), "a", 1337)
    assert minigpt("study", path, "--only", "a", "--seeds", 1).status == 0
    os.rename("runs", "elsewhere")
    before = {file: file.stat().st_mtime_ns for file in Path("docs").rglob("*") if file.is_file()}
    again = minigpt("study", path, "--only", "a", "--seeds", 1)
    assert (again.status, again.err) == (0, "")
    assert again.out.splitlines()[0] == "[1/1] done before"
    unchanged = {file: time for file, time in before.items() if file.name != "runner.yaml"}
    assert unchanged.items() <= {file: file.stat().st_mtime_ns for file in before}.items()

    write(runs={"a": "--model.lr 0.5", "b": "--model.n_layer 1"}, comparisons=["b - a"])
    other = minigpt("study", path, "--only", "a", "--seeds", 1)
    assert other.status == 2
    assert "holds results of other settings (model.lr: 0.006 -> 0.5)" in other.err
    write(runs={"a": "", "b": "--model.n_layer 1"})
    later = minigpt("study", path, "--only", "a", "--seeds", 1)
    assert later.status == 2
    assert "named other comparisons before anything ran (b - a)" in later.err
    write(runs={"a": "", "b": "--model.n_layer 1"}, comparisons=["b - a"])
    Path("text.txt").write_text(Path("text.txt").read_text() + "more\n")
    changed = minigpt("study", path, "--only", "a", "--seeds", 1)
    assert changed.status == 2
    assert "it is another text" in changed.err


def test_a_run_directory_of_other_settings_is_not_gone_on_with(place: Path, minigpt: MiniGPT) -> None:
    path = write(runs={"a": ""}, seeds=1)
    ready(minigpt, read_study(path), "a", 1337)
    done = minigpt("study", write(runs={"a": "--model.dropout 0.5"}, seeds=1))
    assert done.status == 2
    assert "runs/trial/a-1337 holds a run of other settings (model.dropout: 0.2 -> 0.5)" in done.err


def test_a_setting_that_is_new_since_does_not_make_old_results_another_run() -> None:
    was = resolve_config([])
    del was["model"]["init_args"]["lr_schedule"]
    now = resolve_config(["--wandb.group", "x", "--data.path", "README.md"])
    assert list(results.run_differences(was, now)) == []
    assert list(results.run_differences(was, resolve_config(["--model.lr_schedule", "constant"]))) == [
        "model.lr_schedule: None -> constant"
    ]


def test_a_text_keeps_the_name_by_which_it_was_given_unless_that_is_a_place_on_this_machine() -> None:
    for given, kept in (("data/input.txt", "data/input.txt"), ("/home/me/my.txt", "my.txt")):
        assert results.strip_paths({"data": {"path": given}})["data"]["path"] == kept
        assert results.strip_paths_in_text(f"fit --data.path={given} -c x/y") == f"fit --data.path={kept} -c x/y"


def test_runs_are_processes_and_one_without_results_is_told(place: Path, minigpt: MiniGPT) -> None:
    path = write(runs={"bad": "", "good": ""}, seeds=1)
    (ready(minigpt, read_study(path), "bad", 1337) / "best.ckpt").unlink()
    done = minigpt("study", path)
    assert done.status == 2
    assert re.search(r"^\[1/2\] bad-1337 FAILED: .*best.ckpt does not exist", done.out, re.MULTILINE)
    assert re.search(r"^\[2/2\] good-1337 done: \d\.\d{4} nats/char at step 20, ", done.out, re.MULTILINE)
    assert "failed: bad-1337: the checkpoint runs/trial/bad-1337/best.ckpt does not exist" in done.err
    assert [folder.name for folder in Path("docs/results/trial/runs").iterdir()] == ["good-1337"]
    report = minigpt("report", "docs/results/trial")
    assert report.status == 0
    page = Path("docs/results/trial/index.md").read_text()
    assert re.search(r"^- failed: `bad-1337`: .*best.ckpt does not exist", page, re.MULTILINE)
    shutil.rmtree("runs/trial/bad-1337")
    assert minigpt("study", path).status == 0
    assert not Path("docs/results/trial/failed.json").exists()
    assert "the sea" not in done.out  # what a run prints goes to its log
    assert "best val/loss" in Path("runs/trial/good-1337.log").read_text()


@pytest.mark.slow
def test_a_run_that_diverges_is_told_and_the_others_go_on(place: Path, minigpt: MiniGPT) -> None:
    path = write(runs={"bad": "--model.lr 1e30", "good": ""}, seeds=1)
    done = minigpt("study", path, "--jobs", 2)
    assert done.status == 3
    assert "bad-1337 FAILED: error: the run diverged" in done.out
    assert "failed: bad-1337: error: the run diverged" in done.err
    assert [folder.name for folder in Path("docs/results/trial/runs").iterdir()] == ["good-1337"]


@pytest.mark.slow
def test_a_stopped_study_goes_on_to_the_bit(place: Path, minigpt: MiniGPT) -> None:
    steps = "--trainer.max_steps 1500 --data.eval_every 500 --checkpoint.every_n_train_steps 1000"
    path = write(runs={"a": steps, "b": steps}, seeds=1)
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    words = [sys.executable, "-m", "minigpt_pl", "study", str(path), "--jobs", "2"]
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)
    run_dirs = [Path("runs/trial/a-1337"), Path("runs/trial/b-1337")]
    for run_dir in run_dirs:
        while not (run_dir / "metrics.csv").is_file() or len((run_dir / "metrics.csv").read_text().splitlines()) < 5:
            assert process.poll() is None
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on: minigpt study trial.yaml --jobs 2" in out
    for run_dir in run_dirs:
        assert json.loads((run_dir / "summary.json").read_text())["stop_reason"] == "interrupted"
        assert json.loads((run_dir / "summary.json").read_text())["total_steps"] < 1500
    assert not list(Path("docs/results/trial").glob("runs/*"))
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a-1337 goes on" in done.stdout
    straight = subprocess.run(
        [*words[:3], "fit", *read_study(path).configurations["a"].words, "--run_dir", "straight"],
        env=env | {"OMP_NUM_THREADS": str(max(1, runner.cpu_count() // 2))},
    )
    assert straight.returncode == 0
    assert differences(Path("straight"), run_dirs[0]) == []
