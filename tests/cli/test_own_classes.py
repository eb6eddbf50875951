"""A model and a data class of the user's own on the command line: every command, and what a checkpoint may not do.

The messages about classes that cannot be used are in docs/build/errors_page.py, which test_bad_input runs.
"""

import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Outcome
from support.own_classes import forget, new_python, write_module
from support.runs import SMALL, at_micro_batch, differences, interrupt, summary

from minigpt_pl import ModernLM, TextDataModule, generate, load_checkpoint
from minigpt_pl.experiments.results import measure
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.lit_modules import MODELS

Call = Callable[..., Outcome]
OWN = ("--model", "my_module.MyLM", "--data", "my_module.MyData")
ARGS = ("--model.my_factor", 0.25, "--data.my_noise", 0.5, "--data.path", "text.txt")
RUNS: dict[str, tuple[Any, ...]] = {
    "own": (*SMALL, *OWN, *ARGS),
    "mean": (*SMALL, "--model", "my_module.MeanLM", "--data.path", "text.txt"),
    "plain": (*SMALL, "--data.path", "text.txt"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own")
    write_module(directory)
    text = "".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(60))
    (directory / "text.txt").write_text(text, "utf-8")
    return directory


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the module in it, which has not been imported."""
    monkeypatch.chdir(home)
    with new_python():
        yield home


@pytest.fixture
def run(here: Path, minigpt: Call) -> Callable[[str], Path]:
    """The directory of a run by its name in RUNS; each is made once."""

    def make(name: str) -> Path:
        if not Path(name).exists():
            outcome = minigpt("fit", *RUNS[name], "--run_dir", name)
            assert outcome.status == 0, outcome.err
        forget()
        Path("imported").unlink(missing_ok=True)
        return here / name

    return make


def named_by(name: str) -> tuple[str, ...]:
    """The options that name the classes of a run."""
    return OWN if name == "own" else ("--model", "my_module.MeanLM")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "last.ckpt")["state_dict"]


# A run.


def test_both_classes_act_and_their_arguments_are_recorded(run: Callable[[str], Path]) -> None:
    config = yaml.safe_load((run("own") / "config.yaml").read_text("utf-8"))
    assert config["model"]["class_path"] == "my_module.MyLM"
    assert config["model"]["init_args"]["my_factor"] == 0.25
    assert config["data_class"] == "my_module.MyData"
    assert config["data"]["my_noise"] == 0.5
    assert config["data"]["batch_size"] == 4
    own, plain = weights(run("own")), weights(run("plain"))
    assert own.keys() == plain.keys()
    assert not any(torch.equal(own[name], plain[name]) for name in own)
    state = torch.load(run("own") / "last.ckpt")["optimizer_states"][0]
    assert state["param_groups"][0]["momentum"] == 0.9


def test_a_run_without_own_classes_records_none(run: Callable[[str], Path]) -> None:
    assert "data_class" not in (run("plain") / "config.yaml").read_text("utf-8")


@pytest.mark.parametrize("name", ["own", "mean"])
def test_a_stopped_run_resumes_exactly(minigpt: Call, run: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    straight, stopped = run(name), tmp_path / "stopped"
    with at_micro_batch(7, interrupt):
        assert minigpt("fit", *RUNS[name], "--run_dir", stopped).status == 130
    forget()
    named = named_by(name)
    resumed = minigpt("fit", "--run_dir", stopped, "--ckpt_path", "last", *named)
    assert (resumed.status, resumed.err) == (0, "")
    assert differences(straight, stopped) == []
    assert f"--ckpt_path last {' '.join(named)} --trainer.max_steps MORE" in resumed.out


@pytest.mark.parametrize("name", ["own", "mean"])
def test_validate_and_predict_use_the_own_classes(minigpt: Call, run: Callable[[str], Path], name: str) -> None:
    directory = run(name)
    checkpoint = ("--ckpt_path", directory / "best.ckpt", *named_by(name))
    outcome = minigpt("validate", *checkpoint)
    assert outcome.status == 0, outcome.err
    metrics = dict(line.split() for line in outcome.out.splitlines())
    assert float(metrics["val/loss"]) == pytest.approx(summary(directory)["best_val"], abs=1e-6)
    outcome = minigpt("predict", *checkpoint, "--sample.prompt", "the", "--sample.max_new_tokens", 40)
    assert outcome.status == 0, outcome.err
    assert outcome.out == f"the{generate(load_checkpoint(directory / 'best.ckpt'), 'the', max_new_tokens=40)[0]}\n"


def test_files_name_classes_as_flags_do(minigpt: Call, run: Callable[[str], Path], tmp_path: Path) -> None:
    files = {
        "nested.yaml": "model: {class_path: my_module.MyLM, init_args: {my_factor: 0.25}}\n"
        "data: {class_path: my_module.MyData, init_args: {my_noise: 0.5, path: text.txt}}\n",
        "short.yaml": "model: my_module.MyLM\ndata: my_module.MyData\n",
        "other.yaml": "data: {class_path: my_module.OtherData}\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, "utf-8")
    forms = (
        (*SMALL, *OWN, *ARGS),
        (*SMALL, *ARGS, *OWN),  # the options before their class
        (*SMALL, "--model", "ClassicLM", *OWN[:2], "--data", "TextDataModule", *OWN[2:], *ARGS),
        (*SMALL, *ARGS, *OWN[:2], "--data_class", OWN[3]),
        (*SMALL, "-c", tmp_path / "nested.yaml"),
        (*SMALL, "-c", tmp_path / "short.yaml", *ARGS),
        ("-c", run("own") / "config.yaml"),
        ("-c", tmp_path / "other.yaml", "-c", run("own") / "config.yaml"),
    )
    printed = []
    for args in forms:
        forget()
        printed.append(minigpt("fit", *args, "--print_config"))
        assert printed[-1].status == 0, (args, printed[-1].err)
    assert [outcome.out for outcome in printed] == [printed[0].out] * len(forms)
    (tmp_path / "printed.yaml").write_text(printed[0].out, "utf-8")
    forget()
    again = minigpt("fit", "-c", tmp_path / "printed.yaml", "--run_dir", tmp_path / "again")
    assert again.status == 0, again.err
    assert differences(run("own"), tmp_path / "again") == []


def test_help_lists_the_options_of_an_own_class(minigpt: Call, here: Path) -> None:
    page = minigpt("fit", "--model.help", "my_module.MyLM").out
    assert "--model.my_factor X                 MyLM: Scale of the loss. [0.5]" in page
    assert "--model.rope_theta" in page
    assert "--model.my_note" in page
    page = minigpt("fit", "--data.help=my_module.MyData").out
    assert "--data.my_noise X                   MyData: Share of the training inputs that are replaced. [0.3]" in page
    assert "my_" not in minigpt("fit", "--help").out


def test_own_arguments_are_fixed_by_a_checkpoint_unless_the_class_says_otherwise(
    minigpt: Call, run: Callable[[str], Path], tmp_path: Path
) -> None:
    fork = (
        "fit",
        "--ckpt_path",
        run("own") / "last.ckpt",
        *OWN,
        "--trainer.max_steps",
        17,
        "--run_dir",
        tmp_path / "r",
    )
    refused = minigpt(*fork, "--model.my_factor", 0.5)
    assert refused.status == 2
    assert "--model.my_factor 0.5" in refused.err
    assert "was trained with 0.25" in refused.err
    MODELS["MyLM"].mutable_args = ModernLM.mutable_args | {"my_factor"}
    accepted = minigpt(*fork, "--model.my_factor", 0.5, "--data.my_noise", 0.125)
    assert accepted.status == 0, accepted.err
    lines = {"model.my_factor: 0.25 -> 0.5", "data.my_noise: 0.5 -> 0.125", "trainer.max_steps: 16 -> 17"}
    assert set(accepted.err.splitlines()) == lines


def test_a_run_continues_with_another_data_class(minigpt: Call, run: Callable[[str], Path], tmp_path: Path) -> None:
    fork = ("fit", "--trainer.max_steps", 17, "--ckpt_path")
    there = minigpt(*fork, run("plain") / "last.ckpt", "--data", OWN[3], "--run_dir", tmp_path / "there")
    assert there.status == 0, there.err
    assert "data: TextDataModule -> my_module.MyData\n" in there.err
    back = minigpt(
        *fork, run("own") / "last.ckpt", *OWN[:2], "--data", "TextDataModule", "--run_dir", tmp_path / "back"
    )
    assert back.status == 0, back.err
    assert "data: my_module.MyData -> TextDataModule\n" in back.err
    assert "data_class" not in (tmp_path / "back" / "config.yaml").read_text("utf-8")


# Without the class, from other commands and from Python.


def test_a_class_that_only_a_checkpoint_names_is_refused_and_not_imported(
    minigpt: Call, run: Callable[[str], Path], here: Path, tmp_path: Path
) -> None:
    last = run("own") / "last.ckpt"
    for command in (("fit", "--run_dir", tmp_path / "new"), ("fit",), ("validate",), ("test",), ("predict",)):
        outcome = minigpt(*command, "--ckpt_path", last)
        assert (outcome.status, outcome.out) == (2, "")
        expected = "error: the checkpoint needs the class my_module.MyLM, which is not one of minigpt_pl; "
        assert outcome.err == f"{expected}if you trust it, add {' '.join(OWN)}, or in Python import it first\n"
    with pytest.raises(UserError, match="needs the class my_module.MyLM"):
        load_checkpoint(last)
    assert not (here / "imported").exists()


def test_a_class_may_move_to_another_file(minigpt: Call, run: Callable[[str], Path], tmp_path: Path) -> None:
    write_module(run("own").parent, "moved")
    fork = ("fit", "--ckpt_path", run("own") / "last.ckpt", "--run_dir", tmp_path / "r", "--trainer.max_steps", 17)
    outcome = minigpt(*fork, "--model", "moved.MyLM", "--data", "moved.MyData")
    assert (outcome.status, outcome.err) == (0, "trainer.max_steps: 16 -> 17\n")
    assert "class_path: moved.MyLM" in (tmp_path / "r" / "config.yaml").read_text("utf-8")


def rewritten(path: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A checkpoint with another configuration."""
    checkpoint = torch.load(path)
    change(checkpoint["config"])
    torch.save(checkpoint, to)
    return to


def test_the_class_of_the_data_must_be_named_too(minigpt: Call, run: Callable[[str], Path], tmp_path: Path) -> None:
    path = rewritten(run("own") / "last.ckpt", tmp_path / "other.ckpt", lambda c: c.update(data_class="evil.EvilData"))
    refused = minigpt("validate", "--ckpt_path", path, *OWN[:2])
    assert refused.status == 2
    assert "the checkpoint needs the class evil.EvilData" in refused.err
    assert minigpt("validate", "--ckpt_path", path, *OWN).status == 0


def test_an_own_argument_in_a_checkpoint_imports_nothing(
    minigpt: Call, here: Path, run: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where an argument may be a function, the parser would import it by its path."""
    (here / "typed.py").write_text(
        "from collections.abc import Callable\nfrom minigpt_pl import ModernLM\n\nclass MyLM(ModernLM):\n"
        "    def __init__(self, my_factor: float = 1, my_note: Callable | None = None, **config):\n"
        "        super().__init__(**config)\n"
    )
    (here / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')\n")
    note = {"my_note": "evil.function"}
    bad = rewritten(run("own") / "last.ckpt", tmp_path / "bad.ckpt", lambda c: c["model"]["init_args"].update(note))
    outcome = minigpt("validate", "--ckpt_path", bad, "--model", "typed.MyLM", *OWN[2:])
    assert outcome.status == 2
    assert "it contains 'evil.function'" in outcome.err
    outcome = minigpt("validate", "--ckpt_path", bad, *OWN)
    assert outcome.status == 0, outcome.err  # without a type, it is a text
    assert not (tmp_path / "evil").exists()


def test_python_loads_a_checkpoint_once_its_module_is_imported(
    run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = run("own") / "last.ckpt"
    monkeypatch.syspath_prepend(last.parents[1])
    module = import_module("my_module")
    loaded = ModernLM.load_from_checkpoint(last)
    assert isinstance(loaded, module.MyLM)
    assert loaded.my_factor == 0.25
    assert all(torch.equal(tensor, weights(last.parent)[name]) for name, tensor in loaded.state_dict().items())


def test_export_needs_the_class_too_and_refuses_another_network(
    minigpt: Call, run: Callable[[str], Path], tmp_path: Path
) -> None:
    export = ("export", "--out", tmp_path / "out", "--ckpt_path")
    assert "add --model my_module.MeanLM" in minigpt(*export, run("mean") / "best.ckpt").err
    refused = minigpt(*export, run("mean") / "best.ckpt", "--model", "my_module.MeanLM")
    assert refused.err.startswith("error: only models of minigpt_pl can be exported, not MeanGPT; train a ClassicLM")
    assert not (tmp_path / "out").exists()


def test_a_study_measures_a_run_of_own_classes(run: Callable[[str], Path], minigpt: Call) -> None:
    directory = run("own")
    assert minigpt("validate", "--ckpt_path", directory / "best.ckpt", *OWN).status == 0  # imports them
    result, nll = measure(directory, "own", 1337, "", "")
    assert result.config["data_class"] == "my_module.MyData"
    assert nll.mean.mean() == pytest.approx(result.summary["best_val"], abs=1e-4)


# The classes themselves.


def test_a_users_class_takes_no_name_of_this_package_but_may_be_defined_again() -> None:
    with pytest.raises(UserError, match="minigpt_pl has a class ModernLM itself; give yours another name"):
        type("ModernLM", (ModernLM,), {"__module__": "my_module"})
    with pytest.raises(UserError, match="minigpt_pl has a class TextDataModule itself"):
        type("TextDataModule", (TextDataModule,), {"__module__": "my_module"})
    assert MODELS["ModernLM"] is ModernLM
    with new_python():
        first, second = (type("MyLM", (ModernLM,), {"__module__": "my_module"}) for _ in range(2))
        assert MODELS["MyLM"] is second
        assert first is not second
    assert "MyLM" not in MODELS


def test_an_error_in_an_own_constructor_names_its_line(minigpt: Call, here: Path) -> None:
    outcome = minigpt("fit", *SMALL, "--model", "my_module.FailingLM", "--data.path", "text.txt", "--run_dir", "failed")
    source = Path("my_module.py").read_text("utf-8").splitlines()
    line = source.index('        self.width = config["n_embd"] + "1"') + 1
    assert outcome.status == 2
    assert outcome.err.startswith("error: TypeError: unsupported operand")
    assert outcome.err.endswith(f" (line {line} of my_module)\n")
    assert not Path("failed").exists()
    shutil.rmtree("failed", ignore_errors=True)
