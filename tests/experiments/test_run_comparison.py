"""`minigpt report RUN RUN`: what two runs differ in, and when their losses can be compared at all."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from support.runs import SMALL, summary

from minigpt_pl.cli.options import config_diff, option_specs
from minigpt_pl.experiments.run_comparison import setting_differences

MiniGPT = Callable[..., Outcome]
WORDS = [
    "the",
    "sea",
    "comes",
    "in",
    "and",
    "goes",
    "out",
    "over",
    "sand",
    "stone",
    "wind",
    "a",
    "bird",
    "sings",
    "low",
]
BPE = ("--data.tokenizer", "bpe", "--data.bpe_vocab_size", 60)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def trained(home: Path, minigpt: MiniGPT, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run by its options, trained once; the working directory is that of the runs."""
    monkeypatch.chdir(home)
    chance = random.Random(1)
    for name in ("text", "other"):
        text = "".join(" ".join(chance.choices(WORDS, k=9)) + ".\n" for _ in range(1300))
        Path(f"{name}.txt").write_text(text, "utf-8")

    def train(name: str, *options: object, text: str = "text") -> Path:
        if not Path(name).exists():
            done = minigpt("fit", *SMALL, "--run_dir", name, "--data.path", f"{text}.txt", *options)
            assert done.status == 0, done.err
        return Path(name)

    return train


def found(done: Outcome) -> tuple[float, list[float]]:
    """The mean of a difference, and its interval."""
    mean = re.search(r"^  mean +(\S+) nats per character", done.out, re.M)
    ends = re.search(r"^  95% interval +(\S+) \.\.\. (\S+);", done.out, re.M)
    assert mean is not None
    assert ends is not None
    return float(mean[1]), [float(end) for end in ends.groups()]


def test_two_runs_are_compared_wherever_the_command_runs(
    trained: Callable[..., Path], minigpt: MiniGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = trained("a").resolve()
    b = trained("b", "--model.lr", 0.02, "--model.dropout", 0).resolve()
    monkeypatch.chdir(tmp_path)
    done = minigpt("report", a, b)
    assert done.status == 0, done.err
    rows = {name: rest for name, *rest in (re.split(r"  +", line) for line in done.out.splitlines()) if name}
    assert rows["model.lr"] == ["0.006", "0.02"]
    assert rows["model.dropout"] == ["0.1", "0"]
    assert "model.n_embd" not in rows
    losses = [summary(run)["best_nats_per_char"] for run in (a, b)]
    assert rows["best_nats_per_char"] == [f"{loss:.6g}" for loss in losses]
    assert "data_sha256" not in rows
    mean, (low, high) = found(done)
    assert mean == pytest.approx(losses[0] - losses[1], abs=1e-4)
    assert 0 < low < mean < high
    assert f"does not contain 0: {b} is better on this text" in done.out
    mean, (low, high) = found(minigpt("report", b, a))
    assert low < mean < high < 0
    itself = minigpt("report", a, a)
    assert "Settings that differ: none" in itself.out
    assert "it contains 0: no difference found" in itself.out


def test_runs_with_other_tokenizers_are_compared_by_character(trained: Callable[..., Path], minigpt: MiniGPT) -> None:
    a, bpe = trained("a"), trained("bpe", *BPE)
    done = minigpt("report", a, bpe)
    mean, (low, high) = found(done)
    assert mean == pytest.approx(
        summary(a)["best_nats_per_char"] - summary(bpe)["best_nats_per_char"], abs=0.01
    )  # all but the first token's characters
    assert low < mean < high
    assert re.search(r"^tokenizer_sha256 ", done.out, re.M)


@pytest.mark.parametrize(
    ("name", "options", "text", "message"),
    [
        ("elsewhere", (), "other", "none: the runs have different texts"),
        ("longer", ("--data.train_frac", 0.8), "text", "none: the runs split the text differently"),
        ("tokens", (*BPE, "--data.split_unit", "tokens"), "text", "none: the runs split the text differently"),
        ("short", ("--data.max_eval_tokens", 2000), "text", "no interval    it needs 5,000 characters"),
    ],
)
def test_where_a_comparison_means_nothing_a_line_says_so(
    name: str, options: tuple[object, ...], text: str, message: str, trained: Callable[..., Path], minigpt: MiniGPT
) -> None:
    done = minigpt("report", trained("a"), trained(name, *options, text=text))
    assert done.status == 0, done.err
    assert message in done.out
    assert "95% interval" not in done.out
    assert "Metrics that differ" in done.out


def test_runs_and_results_of_studies_are_told_apart(
    trained: Callable[..., Path], minigpt: MiniGPT, tmp_path: Path
) -> None:
    a = trained("a")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "study.yaml").write_text("runs: {a: ''}\n")
    shutil.copytree(a, tmp_path / "running")
    (tmp_path / "running" / "summary.json").unlink()
    cases: dict[tuple[object, ...], str] = {
        (a,): "report a: it holds a run, not the results of a study; name a second run to compare it with",
        (".",): "report .: it holds no study.yaml; name two of the runs in it, such as a, or name a folder that ",
        ("nothing",): "report nothing: it holds no study.yaml; name a folder that minigpt study has written",
        (a, "nothing"): "report nothing: it holds no run; name two run directories, or one folder of results",
        (
            tmp_path / "results",
            a,
        ): "it holds the results of a study; name two run directories, or one folder of results",
        (a, a, a): "report compares two runs, not 3; name two, or write a study",
        (a, tmp_path / "running"): "it holds no summary.json; wait until the run ends, or stop it: then it writes one",
    }
    for folders, message in cases.items():
        done = minigpt("report", *folders)
        assert (done.status, done.out) == (2, "")
        assert message in done.err
        assert done.err.count("\n") == 1


def test_an_option_that_one_run_is_too_old_for_is_no_difference() -> None:
    schedule = option_specs("fit")["model.lr_schedule"].default
    old = {"model": {"init_args": {"lr": 1.0}}, "wandb": None}
    new = {"model": {"init_args": {"lr": 1.0, "lr_schedule": schedule}}, "wandb": {"group": "g"}, "tensorboard": False}
    assert [name for name, *_ in config_diff(new, old)] != []
    for one, other in ((old, new), (new, old)):
        assert setting_differences(one, other) == []
