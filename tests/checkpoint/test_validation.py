"""Nothing in a checkpoint is executed, imported or trusted: every reader refuses hostile files in one line."""

import copy
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from support.runs import SMALL, train_small

from minigpt_pl import load_checkpoint
from minigpt_pl.checkpoint.io import read_checkpoint, tensor_digest
from minigpt_pl.checkpoint.validation import validate_config, validate_sizes
from minigpt_pl.data.datamodule import DATA_MODULES, TextDataModule
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.lit_modules import MODELS, ClassicLM, LanguageModel, ModernLM

Call = Callable[..., Outcome]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one step."""
    return train_small(tmp_path_factory.mktemp("trained"), "--trainer.max_steps", 1) / "last.ckpt"


class Bomb:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def rewritten(path: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A changed checkpoint with the right digest."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    checkpoint["digest"] = tensor_digest(checkpoint)
    torch.save(checkpoint, to)
    return to


def refusals(minigpt: Call, path: Path, new: Path) -> list[str]:
    """The messages of all readers of checkpoints; each must refuse this one in one line."""
    messages = []
    for command in ("fit", "validate", "test", "predict"):
        for args in (("--ckpt_path", path), ("--ckpt_path", path, "--run_dir", new))[: 2 if command == "fit" else 1]:
            outcome = minigpt(command, *args)
            assert outcome.status == 2, (command, outcome.err)
            assert outcome.err.startswith("error: ")
            assert outcome.err.count("\n") == 1
            assert len(outcome.err) < 600
            messages.append(outcome.err)
    for load in (ModernLM.load_from_checkpoint, LanguageModel.load_from_checkpoint, load_checkpoint):
        with pytest.raises(UserError) as refusal:
            load(path)
        messages.append(str(refusal.value))
    with pytest.raises(UserError):
        TextDataModule.load_from_checkpoint(path)
    assert not new.exists()
    return messages


def test_pickles_are_not_executed(
    minigpt: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In hyperparameters, in a callback's state, and as the whole file, in each format that torch.load reads."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # even then
    mark = tmp_path / "executed"
    bomb = Bomb(mark)
    paths = [tmp_path / f"{number}.ckpt" for number in range(5)]
    rewritten(trained, paths[0], lambda c: c.update(hyper_parameters={"vocab_size": bomb}))
    rewritten(trained, paths[1], lambda c: c["callbacks"].update(ValLossEarlyStopping=bomb))
    torch.save(bomb, paths[2])
    torch.save(bomb, paths[3], _use_new_zipfile_serialization=False)
    paths[4].write_bytes(pickle.dumps(bomb))
    for path in paths:
        refusals(minigpt, path, tmp_path / "new")
        assert not mark.exists()
    torch.load(paths[2], weights_only=False)
    assert mark.exists()  # the bomb works


LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": "touch MARK"}}


def callback(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks": [{"class_path": class_path, "init_args": init_args}]}}


HOSTILE: dict[str, Any] = {
    "class": callback("subprocess.Popen", args="touch MARK"),
    "class as a string": {"trainer": {"callbacks": ["antigravity.Anything"]}},
    "plugin": {"trainer": {"plugins": [{"class_path": "evil.Plugin"}]}},
    "strategy": {"trainer": {"strategy": "evil.Strategy"}},
    "profiler": {"trainer": {"profiler": {"class_path": "evil.Profiler"}}},
    "file": {"trainer": {"callbacks": "/tmp/evil.yaml"}},
    "file in a list": {"trainer": {"callbacks": ["evil.yaml"]}},
    "function": callback(LAMBDA, on_fit_start="os.abort"),
    "function through our module": callback(LAMBDA, on_fit_start="minigpt_pl.runtime.signals.os.abort"),
    "class that our module imports": callback("minigpt_pl.training.summary.Path"),
    "class that Lightning imports": callback("lightning.pytorch.cli.ArgumentParser"),
    "nested": callback(LAMBDA, on_fit_start=POPEN),
    "early stopping": {"early_stopping": POPEN},
    "data": {"data": POPEN},
    "argument of the model": {"model": {"init_args": {"lr": POPEN}}},
    "model": {"model": {"class_path": "evil.EvilLM"}},
    "class of the data": {"data_class": "evil.EvilData"},
    "class of the data, not a name": {"data_class": POPEN},
    "abstract model": {"model": {"class_path": "minigpt_pl.training.lit_modules.LanguageModel"}},
    "not a dict": {"model": "evil.yaml"},
    "another config file": {"config": ["/etc/hostname"]},
}


def merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


@pytest.mark.parametrize("name", ["class", "function through our module", pytest.param("all", marks=pytest.mark.slow)])
def test_a_config_builds_no_foreign_class(minigpt: Call, trained: Path, tmp_path: Path, name: str) -> None:
    for change in HOSTILE.values() if name == "all" else [HOSTILE[name]]:
        path = rewritten(trained, tmp_path / "bad.ckpt", lambda c, change=change: merge(c["config"], change))
        for args in (("fit", "--run_dir", tmp_path / "new"), ("predict",)):
            outcome = minigpt(*args, "--ckpt_path", path)
            if args[0] == "predict" and "trainer" in change:  # it builds nothing of the run's trainer
                assert outcome.status == 0, outcome.err
                continue
            assert outcome.status == 2, outcome.err
            assert outcome.err.startswith("error: ")
            assert outcome.err.count("\n") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.ckpt"]


def validated(config: dict[str, Any], path: Path) -> dict[str, Any]:
    return validate_config(config, path, [], MODELS, DATA_MODULES)


def test_every_hostile_config_is_refused_before_it_is_parsed(trained: Path) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    for change in HOSTILE.values():
        changed = copy.deepcopy(checkpoint)
        merge(changed["config"], change)
        with pytest.raises(UserError):
            validate_sizes(changed | {"config": validated(changed["config"], trained)}, MODELS)
    assert validated(checkpoint["config"], trained) == checkpoint["config"]
    merge(checkpoint["config"], {"model": {"class_path": "evil.ModernLM"}, "data_class": "evil.TextDataModule"})
    config = validated(checkpoint["config"], trained)
    assert config["model"]["class_path"] == "minigpt_pl.ModernLM"
    assert "data_class" not in config


def run_with_callback(trained: Path, run: Path, class_path: str) -> tuple[object, ...]:
    """Command to resume a run that had a callback."""
    run.mkdir()
    named = [{"class_path": class_path}]
    rewritten(trained, run / "last.ckpt", lambda c: c["config"]["trainer"].update(callbacks=named))
    return ("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 2)


def test_a_users_own_callback_must_be_repeated(
    minigpt: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_callbacks.py").write_text(
        "from lightning.pytorch import Callback\n\nclass Mine(Callback):\n"
        "    def on_fit_end(self, trainer, module):\n        print('mine was called')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    resume = run_with_callback(trained, tmp_path / "run", "my_callbacks.Mine")
    refused = minigpt(*resume)
    assert refused.status == 2
    assert "my_callbacks.Mine" in refused.err
    assert "--trainer.callbacks" in refused.err
    repeated = minigpt(*resume, "--trainer.callbacks+=my_callbacks.Mine")
    assert repeated.status == 0, repeated.err
    assert "mine was called" in repeated.out


def test_a_callback_that_monitors_an_unknown_metric_is_the_users_mistake(
    minigpt: Call, tmp_path: Path, text_file: Path
) -> None:
    args = ("--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.monitor", "val_loss")
    done = minigpt("fit", *SMALL, "--data.path", text_file, "--run_dir", tmp_path / "r", *args)
    assert done.status == 2
    error = done.err.splitlines()[-1]
    assert "no evaluation has this metric; did you mean val/loss?" in error
    assert "val/loss" in error
    assert done.err.count("error") == 1


def test_a_callback_of_lightning_is_kept_on_resume(minigpt: Call, trained: Path, tmp_path: Path) -> None:
    run, class_path = tmp_path / "run", "lightning.pytorch.callbacks.LearningRateMonitor"
    resumed = minigpt(*run_with_callback(trained, run, class_path))
    assert resumed.status == 0, resumed.err
    assert class_path in (run / "config.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_layer", 10**9), ("n_embd", 10**9), ("n_head", 10**9), ("block_size", 10**12), ("n_experts", 10**9),
        ("ffn_mult", 1e12), ("n_embd", -16), ("n_layer", "many"), ("n_embd", None), ("vocab_size", 10**12),
    ],
)  # fmt: skip
def test_sizes_that_do_not_match_the_tensors_are_refused(
    minigpt: Call, trained: Path, tmp_path: Path, name: str, value: Any
) -> None:
    def claim(checkpoint: dict[str, Any]) -> None:
        if name == "vocab_size":
            checkpoint["vocab_size"] = value
        else:
            checkpoint["config"]["model"]["init_args"][name] = value

    path = rewritten(trained, tmp_path / "bad.ckpt", claim)
    with pytest.raises(UserError, match="does not match its weights"):
        load_checkpoint(path)
    if value == 10**9:
        assert "does not match its weights" in minigpt("fit", "--ckpt_path", path, "--run_dir", tmp_path / "new").err
        assert "does not match its weights" in minigpt("predict", "--ckpt_path", path).err
    assert not (tmp_path / "new").exists()


def test_tensors_larger_than_the_file_are_refused(minigpt: Call, trained: Path, tmp_path: Path) -> None:
    """A number that is repeated a million million times takes four bytes in the file."""

    def inflate(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.token_embedding.weight"] = torch.zeros(1).expand(10**6, 10**6)

    checkpoint = torch.load(trained, weights_only=True)
    inflate(checkpoint)
    path = tmp_path / "bad.ckpt"
    torch.save(checkpoint, path)
    assert path.stat().st_size < 200_000
    refusals(minigpt, path, tmp_path / "new")
    checkpoint["state_dict"]["net.token_embedding.weight"] = torch.empty(10**6, 10**6, device="meta")
    torch.save(checkpoint, path)
    with pytest.raises(UserError):
        load_checkpoint(path)


def test_a_file_that_minigpt_did_not_write_is_refused(minigpt: Call, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    for other in ({"state_dict": {}}, [1, 2], 3, {"config": {}}):
        torch.save(other, path)
        with pytest.raises(UserError, match="not a checkpoint of a minigpt model"):
            load_checkpoint(path)
    for message in refusals(minigpt, path, tmp_path / "new"):
        assert "not a checkpoint of a minigpt model" in message
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "not a checkpoint")
    with pytest.raises(UserError):
        load_checkpoint(path)
    rewritten(trained, path, lambda c: c.update(config="evil"))
    refusals(minigpt, path, tmp_path / "new")


def test_a_checkpoint_of_version_0_1_is_refused(minigpt: Call, trained: Path, tmp_path: Path) -> None:
    path = rewritten(trained, tmp_path / "old.ckpt", lambda c: c.update(settings=c.pop("config")))
    for message in refusals(minigpt, path, tmp_path / "new"):
        assert "minigpt_pl 0.1 wrote it, and this version cannot read it; train the model again" in message


def test_the_class_of_a_checkpoint_is_checked(trained: Path) -> None:
    with pytest.raises(UserError, match="holds a ModernLM, not a ClassicLM"):
        ClassicLM.load_from_checkpoint(trained)
    assert isinstance(LanguageModel.load_from_checkpoint(trained), ModernLM)
    assert ModernLM.load_from_checkpoint(trained, dropout=0.5).net.dropout.p == 0.5
    with pytest.raises(UserError, match="rope_theta: of a trained ModernLM only compile, dropout"):
        ModernLM.load_from_checkpoint(trained, rope_theta=50.0)
    assert read_checkpoint(trained)["global_step"] == 1
