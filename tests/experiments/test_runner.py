"""A study: what its file may contain, which runs it plans, and that each run ends with results or a reported failure.

Most runs are trained in this process before the study starts; where it matters, they are processes of their own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import PROJECT, Outcome
from support.runs import differences

from minigpt_pl.experiments import results, spec, tasks
from minigpt_pl.experiments.runner import Runner
from minigpt_pl.experiments.spec import Study, plan, read_study, resolve_config
from minigpt_pl.experiments.statistics import MIN_SEEDS_COMPARISON
from minigpt_pl.runtime.errors import UserError

MiniGPT = Callable[..., Outcome]
SMALL = "-c smoke --samples null --wandb null --model.n_embd 16 --trainer.enable_progress_bar false"
OUT = Path("docs/results/trial")


@pytest.fixture
def directory(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with text.txt. Studies compute on one thread, as the tests share the cores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "count_cores", lambda: 1)
    return tmp_path


def write(**content: object) -> Path:
    path = Path("trial.yaml")
    path.write_text(yaml.safe_dump({"base_args": f"{SMALL} --data.path text.txt", **content}, sort_keys=False), "utf-8")
    return path


def planned(path: Path, seeds: int | None = None, only: tuple[str, ...] = ()) -> list[str]:
    return [str(run) for run in plan(read_study(path), Path("out"), Path("runs"), seeds, list(only))]


# The file and its plan.


def test_first_seeds_come_first_and_named_comparisons_get_more(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = cache(lambda *args: resolve_config([*args]))
    monkeypatch.setattr(spec, "resolve_config", lambda args: resolve(*args))
    path = write(runs={"a": "", "b": "--model.n_layer 1", "c": {"fit": "", "first_seed": 9}}, comparisons=["b - a"])
    assert planned(path, seeds=2) == ["a-1337", "b-1337", "c-9", "a-1338", "b-1338", "c-10"]
    assert planned(path, seeds=1, only=("c", "a", "c")) == ["c-9", "a-1337"]
    names = planned(path)
    assert sum(name.startswith("a-") for name in names) == MIN_SEEDS_COMPARISON == 8
    assert sum(name.startswith("c-") for name in names) == 5
    assert len(planned(write(runs={"a": ""}, seeds=3))) == 3
    own = write(runs={"a": "", "b": {"fit": "", "seeds": 3, "first_seed": 5}}, seeds=2)
    assert planned(own) == ["a-1337", "b-5", "a-1338", "b-6", "b-7"]
    assert planned(own, seeds=1) == ["a-1337", "b-5"]
    first, second = plan(read_study(write(runs={"a": "--model.n_layer 1"}, seeds=2)), Path("o"), Path("r"), None, [])
    assert (first.config["seed_everything"], second.config["seed_everything"]) == (1337, 1338)
    assert first.config["model"]["init_args"]["n_layer"] == 1
    with pytest.raises(UserError, match="--only nix: the study has a"):
        plan(read_study(path), Path("o"), Path("r"), None, ["nix"])


def test_a_run_may_name_directories_of_others_by_seed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses those runs, wherever they stand in the plan, and no part of a longer name counts."""
    resolve = cache(lambda *args: resolve_config([*args]))
    monkeypatch.setattr(spec, "resolve_config", lambda args: resolve(*args))
    path = write(
        runs={
            "t": {"fit": "", "first_seed": 2337},
            "t2": {"fit": "", "first_seed": 3337},
            "student": "--teachers '[runs/t-{seed+1000}, runs/t2-{seed+2000}/best.ckpt, elsewhere/runs/t-2337]'",
            "again": "--teachers runs/student-{seed}",
            "early": "--teachers runs/t-{seed+1001}",
        },
        seeds=2,
    )
    runs = {str(run): run for run in plan(read_study(path), Path("o"), Path("runs"), None, [])}
    assert runs["student-1338"].config["teachers"] == ["runs/t-2338", "runs/t2-3338/best.ckpt", "elsewhere/runs/t-2337"]
    assert runs["student-1338"].args[-1] == "[runs/t-2338, runs/t2-3338/best.ckpt, elsewhere/runs/t-2337]"
    uses = {name: run.uses for name, run in runs.items() if run.uses}
    assert uses == {
        "student-1337": ("t-2337", "t2-3337"), "again-1337": ("student-1337",), "early-1337": ("t-2338",),
        "student-1338": ("t-2338", "t2-3338"), "again-1338": ("student-1338",),
    }  # fmt: skip
    circle = write(runs={"a": "--teachers runs/b-1337", "b": "--teachers runs/a-1337"}, seeds=1)
    with pytest.raises(UserError, match="the runs a-1337, b-1337 wait for each other"):
        planned(circle)


def test_a_run_waits_for_the_runs_that_it_uses(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(runs={"t": "", "student": "--teachers runs/t-{seed}", "other": ""}, seeds=2)
    runs = plan(read_study(path), Path("o"), Path("runs"), None, [])
    study, waiting = Runner(runs, None, 1, 0, OUT), deque(runs)
    assert [str(study.next_run(waiting)) for _ in range(4)] == ["t-1337", "other-1337", "t-1338", "other-1338"]
    assert study.next_run(waiting) is None
    study.remaining.remove(runs[0])  # as it does when t-1337 has ended
    assert str(study.next_run(waiting)) == "student-1337"
    study.fail(runs[3], 3, "the run diverged")
    assert study.next_run(waiting) is None
    assert not waiting
    assert study.failed["student-1338"] == (1, "it uses t-1338, which failed")
    assert "student-1338 FAILED: it uses t-1338, which failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "it needs runs"),
        ({"runs": {}}, "it needs runs"),
        ({"runs": {"a": ""}, "compare": []}, "the key compare is unknown"),
        ({"runs": {"a": {"fit": "", "first_seed": "x"}}}, "runs: a: first_seed is x: it must be an integer"),
        ({"runs": {"a": {"fit": "", "first_seed": -1}}}, "runs: a: first_seed is -1: it must be an integer"),
        ({"runs": {"a": "--data.path it's.txt"}}, "--data.path it's.txt cannot be split into arguments"),
        ({"runs": {"a": "", "b": ""}, "comparisons": 5}, "comparisons is 5: it must be a list"),
        ({"runs": {"a b": ""}}, "runs: a b is not a valid name"),
        ({"runs": {"a": ["x"]}}, "runs: a: give the options of fit"),
        ({"runs": {"a": "", "b": ""}, "comparisons": ["a against b"]}, "such as a - b"),
        ({"runs": {"a": "", "b": ""}, "comparisons": ["a - c"]}, "a - c: write the names of two runs"),
        ({"runs": {"a": "", "b": ""}, "comparisons": ["a - b"] * 7}, "it names 7 comparisons"),
        ({"runs": {"a": ""}, "seeds": 0}, "yaml: seeds is 0"),
        ({"runs": {"a": {"fit": "", "seeds": "x"}}}, "runs: a: seeds is x: it must be at least 1"),
    ],
)
def test_a_file_that_is_not_a_study_is_refused(directory: Path, minigpt: MiniGPT, content: dict, message: str) -> None:
    done = minigpt("study", write(**content))
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not Path("docs").exists()


@pytest.mark.parametrize("option", ["--out", "--run_dir"])
def test_a_directory_that_is_a_file_is_refused(directory: Path, minigpt: MiniGPT, option: str) -> None:
    Path("file").write_text("here")
    done = minigpt("study", write(runs={"a": ""}), option, "file", "--seeds", 1)
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith("error: file")
    assert Path("file").read_text() == "here"


@pytest.mark.parametrize("option", ["--jobs", "--seeds"])
def test_a_number_below_one_is_refused(minigpt: MiniGPT, option: str) -> None:
    done = minigpt("study", "ablations", option, 0)
    assert (done.status, done.err) == (2, f"error: {option} 0: it must be at least 1\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--model.lrr 1", "run a: --model.lrr 1: "),
        ("--seed_everything 3", "run a: --seed_everything 3: the study decides it"),
        ("--run_dir x", "the study decides it"),
        ("--data.path nix.txt", "run a: data.path nix.txt"),
    ],
)
def test_a_run_that_is_impossible_is_refused_before_any_starts(
    directory: Path, minigpt: MiniGPT, args: str, message: str
) -> None:
    done = minigpt("study", write(runs={"good": "", "a": args}))
    assert done.status == 2
    assert message in done.err
    assert not Path("runs").exists()


# Runs.


def train(minigpt: MiniGPT, study: Study, name: str, seed: int) -> Path:
    """Trains a run where the study would train it."""
    run_dir = Path("runs", study.name, f"{name}-{seed}")
    done = minigpt("fit", *study.variants[name].args, "--seed_everything", seed, "--run_dir", run_dir)
    assert done.status == 0, done.err
    return run_dir


def test_a_run_that_has_ended_leaves_its_results(directory: Path, minigpt: MiniGPT) -> None:
    bpe = "--data.tokenizer bpe --data.bpe_vocab_size 50 --model.block_size 16"
    path = write(runs={"char": "", "bpe": f"{bpe} --data.path {directory / 'text.txt'}"}, seeds=1)
    for name in ("char", "bpe"):
        train(minigpt, read_study(path), name, 1337)
    done = minigpt("study", path)
    assert done.status == 0, done.err
    assert re.search(r"^\[2/2\] bpe-1337 done: \d\.\d{4} nats/char", done.out, re.MULTILINE)
    files = {file.name: file for file in OUT.iterdir() if file.name != ".lock"}
    assert set(files) == {"study.yaml", "baselines.json", "runs.jsonl", "metrics.csv", "token_nll.npz"}
    for name in set(files) - {"token_nll.npz"}:
        assert str(directory) not in files[name].read_text("utf-8"), name
    char, bpe = (next(one for one in results.read_results(OUT) if one.name == name) for name in ("char", "bpe"))
    losses = results.read_token_nll(OUT)
    for result in (char, bpe):
        # its token losses are those of the best evaluation
        nll, best, per_character = losses[result.name], result.summary["best_val"], result.summary["best_nats_per_char"]
        assert nll.seeds.tolist() == [1337]
        assert nll.total.dtype == np.float32
        assert nll.total.mean() == pytest.approx(best, abs=results.NATS_STEP / 2)
        assert nll.total.sum() / nll.lengths.sum() == pytest.approx(per_character, abs=results.NATS_STEP / 2)
        assert np.nanmean(nll.by_character()) == pytest.approx(per_character, abs=results.NATS_STEP / 2)
        assert nll.window_sd() == pytest.approx(result.summary["window_sd"], abs=results.NATS_STEP)
        assert result.metrics("val")["step"].tolist() == [10, 20]
        assert result.metrics("train")["step"].tolist() == [10, 20]
        assert result.metrics("val")["val/loss"].min() == pytest.approx(best, rel=1e-5)
        assert len(result.sample) > 100
        assert f"--seed_everything {result.seed}" in result.command
    assert bpe.config["data"]["path"] == "text.txt"
    assert "--data.path text.txt --seed" in bpe.command
    assert char.batch_protocol() != bpe.batch_protocol()
    protocol = char.batch_protocol()
    char.config["data"]["sampling"] = "epoch"
    assert char.batch_protocol() != protocol
    del char.config["data"]["sampling"]  # as in results from before there was a choice
    assert char.batch_protocol() == protocol
    # both are of the same characters, wherever windows start
    text = Path("text.txt").read_text()
    validated = text[int(0.9 * len(text)) :]
    assert len(losses["char"].by_character()) == len(losses["bpe"].by_character()) == len(validated)
    data = results.datamodule_of(bpe.config)
    tokens = [data.tokenizer.vocabulary[i] for i in data.tokens("val")]
    assert "".join(tokens) == validated
    by_character = losses["bpe"].by_character()
    assert np.isnan(by_character[: len(tokens[0])]).all()
    assert by_character[len("".join(tokens[:2]))] == float(losses["bpe"].total[1]) / len(tokens[2])
    assert losses["bpe"].by_position().shape == (16,)
    baselines = json.loads((OUT / "baselines.json").read_text())["baselines"]
    assert baselines["unigram"]["nats_per_char"] > baselines["4-gram"]["nats_per_char"]


def test_stored_runs_are_not_repeated_and_runs_of_other_options_are_refused(directory: Path, minigpt: MiniGPT) -> None:
    """A clean clone has the results and no run directories."""
    args = ("study", "trial.yaml", "--only", "a", "--seeds", 1)
    write(runs={"a": "--model.dropout 0.5", "b": ""}, comparisons=["b - a"])
    train(minigpt, read_study(Path("trial.yaml")), "a", 1337)
    write(runs={"a": "", "b": "--model.n_layer 1"}, comparisons=["b - a"])
    unfinished = minigpt(*args)
    assert unfinished.status == 2
    assert "runs/trial/a-1337 holds a-1337 with another configuration (model.dropout: 0.5 -> 0.2)" in unfinished.err
    assert not OUT.exists()
    write(runs={"a": "--model.dropout 0.5", "b": "--model.n_layer 1"}, comparisons=["b - a"])
    assert minigpt(*args).status == 0
    os.rename("runs", "elsewhere")
    before = {file: file.stat().st_mtime_ns for file in OUT.iterdir() if file.name != "study.yaml"}
    again = minigpt(*args)
    assert (again.status, again.err) == (0, "")
    assert again.out.splitlines()[0] == "1 of 1 runs have results already"
    assert before == {file: file.stat().st_mtime_ns for file in before}

    changes = {
        "the results hold a-1337 with another configuration (model.lr: 0.006 -> 0.5)": {
            "runs": {"a": "--model.dropout 0.5 --model.lr 0.5", "b": ""}, "comparisons": ["b - a"]
        },
        "named other comparisons before anything ran (b - a)": {"runs": {"a": "--model.dropout 0.5", "b": ""}},
    }  # fmt: skip
    for message, content in changes.items():
        write(**content)
        changed = minigpt(*args)
        assert changed.status == 2
        assert message in changed.err
    Path("text.txt").write_text(Path("text.txt").read_text() + "more\n")
    write(runs={"a": "--model.dropout 0.5", "b": ""}, comparisons=["b - a"])
    changed = minigpt(*args)
    assert changed.status == 2
    assert "the text differs" in changed.err


@pytest.mark.e2e
def test_a_run_is_a_process_and_a_run_without_results_is_reported(
    directory: Path, minigpt: MiniGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = f"{SMALL} --data.path text.txt".replace("--wandb null", "--wandb.offline true")
    path = write(runs={"bad": "", "good": ""}, seeds=1, base_args=base)
    for name, text in (("NAME", "n"), ("RUN_ID", "i"), ("PROJECT", "p"), ("MODE", "online"), ("RUN_GROUP", "g")):
        monkeypatch.setenv(f"WANDB_{name}", text)
    Path("runs/trial/bad-1337").mkdir(parents=True)
    Path("runs/trial/bad-1337/summary.json").write_text('{"stop_reason": "completed"}')
    done = minigpt("study", path)
    assert done.status == 2
    assert re.search(
        r"^\[1/2\] bad-1337 FAILED: .*best.ckpt.* does not exist.*; time left unknown$", done.out, re.MULTILINE
    )
    assert re.search(r"^\[2/2\] good-1337 done: \d\.\d{4} nats/char at step 20, \d+ s$", done.out, re.MULTILINE)
    assert re.search("^failed: bad-1337: .*best.ckpt.* does not exist", done.err, re.MULTILINE)
    assert "the sea" not in done.out  # what a run prints goes to its log
    wandb = yaml.safe_load(Path("runs/trial/good-1337/config.yaml").read_text("utf-8"))["wandb"]
    assert [wandb[name] for name in ("name", "project", "offline", "group")] == [None, "p", True, "trial/good"]
    assert not list(Path("runs/trial/good-1337/wandb").glob("offline-run-*-i"))  # each run is one of its own
    assert "best val/loss" in Path("runs/trial/good-1337.log").read_text()
    assert [str(result) for result in results.read_results(OUT)] == ["good-1337"]
    assert minigpt("report", OUT).status == 0
    assert re.search(
        r"^- failed: `bad-1337`: .*best.ckpt.* does not exist", (OUT / "report.md").read_text(), re.MULTILINE
    )
    shutil.copytree("runs/trial/good-1337", "runs/trial/bad-1337", dirs_exist_ok=True)
    assert minigpt("study", path).status == 0
    assert not (OUT / "failed.json").exists()
    assert [str(result) for result in results.read_results(OUT)] == ["bad-1337", "good-1337"]


@pytest.mark.slow
def test_a_run_that_diverges_is_reported_and_the_others_continue(directory: Path, minigpt: MiniGPT) -> None:
    path = write(runs={"bad": "--model.lr 1e30", "good": ""}, seeds=1)
    done = minigpt("study", path, "--jobs", 2)
    assert done.status == 3
    assert "bad-1337 FAILED: error: the run diverged" in done.out
    assert "failed: bad-1337: error: the run diverged" in done.err
    assert [str(result) for result in results.read_results(OUT)] == ["good-1337"]


@pytest.mark.slow
def test_a_stopped_study_resumes_bit_exactly(directory: Path, minigpt: MiniGPT) -> None:
    steps = "--trainer.max_steps 600 --data.eval_every 200 --checkpoint.every_n_train_steps 400"
    path = write(runs={"a": steps, "b": steps, "c": steps}, seeds=1)
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "minigpt_pl", "study", str(path), "--jobs", "2"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    run_dirs = [Path("runs/trial/a-1337"), Path("runs/trial/b-1337")]
    for run_dir in run_dirs:
        while not (run_dir / "metrics.csv").is_file() or len((run_dir / "metrics.csv").read_text().splitlines()) < 5:
            assert process.poll() is None
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes the study: minigpt study trial.yaml --jobs 2" in out
    for run_dir in run_dirs:
        assert json.loads((run_dir / "summary.json").read_text())["stop_reason"] == "interrupted"
        assert json.loads((run_dir / "summary.json").read_text())["total_steps"] < 600
    assert not Path("runs/trial/c-1337").exists()  # no run starts after the signal
    assert results.read_results(OUT) == []
    done = subprocess.run([*command, "--only", "a", "b"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a-1337 resumes" in done.stdout
    uninterrupted = subprocess.run(
        [*command[:3], "fit", *read_study(path).variants["a"].args, "--run_dir", "uninterrupted"],
        env=env | {"OMP_NUM_THREADS": str(max(1, tasks.count_cores() // 2))},
    )
    assert uninterrupted.returncode == 0
    assert differences(Path("uninterrupted"), run_dirs[0]) == []
