"""What Weights & Biases stores: the .wandb files are read back, and nothing of a run reaches the next one."""

import ast
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PROJECT, Outcome
from support.runs import at_micro_batch

from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.data.baselines import split_baselines
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.training.by_products import read_samples
from minigpt_pl.training.evaluation import MAX_LOAD_METRICS, expert_metrics
from minigpt_pl.training.lit_modules import ModernLM

FIT = (
    "fit", "-c", "smoke", "--model.n_embd", 16, "--model.block_size", 16, "--data.batch_size", 4,
    "--data.train_frac", 0.98, "--data.eval_every", 4, "--trainer.max_steps", 8, "--trainer.log_every_n_steps", 2,
    "--samples.max_new_tokens", 5, "--trainer.enable_progress_bar", "false",
)  # fmt: skip
LOADS = {f"moe/load_{layer}_{expert}" for layer in range(2) for expert in range(4)}
BASELINES = {f"baseline/{name}" for name in ("unigram", "bigram", "trigram", "4-gram", "5-gram", "6-gram", "xz")}
PANELS = {  # as docs/wandb.md shows them
    "Losses": {"train/loss", "val/loss", "val/nats_per_char"} | BASELINES,
    "Learning": {"lr", "train/grad_norm", "train/aux_loss"},
    "Experts": {"moe/dead_experts", "moe/entropy"} | LOADS,
    "Speed": {"perf/tokens_per_s", "tokens_seen", "perf/memory_gib"},
    "Samples": {"samples"},
}


@dataclass
class Written:
    """What a .wandb file holds."""

    id: str = ""
    name: str = ""
    entity: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None


def records(path: Path) -> Iterator[bytes]:
    """The whole records of a .wandb file: a header, then LevelDB log blocks, which may split a record."""
    content, at, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if kind == 0 or at + 7 + length > len(content):  # not written yet, or not completely
            break
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def read(folder: Path) -> Written:
    """The file once it is whole: W&B's own process writes it, and may do so after the run has ended."""
    for _ in range(200):
        if (found := read_now(folder)).exit_code is not None:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{folder} is not finished after ten seconds")


def read_now(folder: Path) -> Written:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    out = Written()
    for content in records(path):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            out.id, out.group, out.job_type = record.run.run_id, record.run.run_group, record.run.job_type
            out.name, out.entity, out.project = record.run.display_name, record.run.entity, record.run.project
            out.tags = list(record.run.tags)
            out.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            out.rows.append({key: value for key, value in items.items() if not key.startswith("_")})
        elif kind == "summary":
            for item in record.summary.update:
                out.summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        elif kind == "metric":
            out.metrics.append(record.metric)
        elif kind == "artifact":
            out.artifacts.append(record.artifact)
        elif kind == "exit":
            out.exit_code = record.exit.exit_code
    return out


def folders(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text("utf-8"))


def test_a_run_is_stored_completely_and_nothing_of_it_reaches_the_next(
    minigpt: Callable[..., Outcome], tmp_path: Path, text_file: Path
) -> None:
    import wandb

    environment = dict(os.environ)
    words = (*FIT, "-c", "moe", "--data.path", text_file, "--trainer.log_every_n_steps", 2)
    one, other = tmp_path / "one", tmp_path / "other"
    labels = ("--wandb.group", "g", "--wandb.job_type", "j", "--wandb.tags", "[a, b]", "--wandb.log_best", "true")
    done = minigpt(*words, "--run_dir", one, *labels)
    assert done.status == 0, done.err
    assert "wandb" not in done.out + done.err.lower()
    assert wandb.run is None
    assert {k: v for k, v in os.environ.items() if "WANDB" in k} == {
        k: v for k, v in environment.items() if "WANDB" in k
    }

    found = read(*folders(one))
    keys = set().union(*found.rows)
    for panel, names in PANELS.items():
        assert names <= keys, f"{panel} lacks {names - keys}"
    assert all(row["trainer/global_step"] in range(2, 9, 2) for row in found.rows)
    evals = [row for row in found.rows if "val/loss" in row]
    assert [row["trainer/global_step"] for row in evals] == [4, 8]
    expected = summary(one)
    assert min(row["val/loss"] for row in evals) == expected["best_val"]
    assert {name: found.summary[name] for name in expected if name != "config"} == {
        k: v for k, v in expected.items() if k != "config"
    }
    best = next(metric for metric in found.metrics if metric.name == "val/loss")
    assert best.summary.min
    assert best.step_metric == "trainer/global_step"
    assert {name: found.config[name] for name in expected["config"]} == expected["config"]
    assert (found.group, found.job_type, found.tags, found.exit_code) == ("g", "j", ["a", "b"], 0)
    assert any(artifact.type == "model" and "best" in artifact.aliases for artifact in found.artifacts)
    tables = sorted(folders(one)[0].glob("files/media/table/*.json"), key=lambda path: path.stat().st_mtime)
    assert [[row[0] for row in json.loads(path.read_text())["data"]] for path in tables] == [[4], [4, 8]]
    assert json.loads(tables[-1].read_text())["data"] == [[*row] for row in read_samples(one / "samples.txt")]

    assert minigpt(*FIT, "--data.path", text_file, "--run_dir", other, "--samples", "null").status == 0
    second = read(*folders(other))
    assert second.id != found.id
    assert (second.group, second.job_type, second.tags, second.artifacts) == ("", "", [], [])
    assert not {key for row in second.rows for key in row if key.startswith("moe/") or key == "samples"}
    assert second.summary["params_total"] != found.summary["params_total"]

    more = minigpt("fit", "--run_dir", one, "--ckpt_path", "last", "--trainer.max_steps", 12)
    assert more.status == 0, more.err
    resumed = read(folders(one)[-1])
    assert len(folders(one)) == 2
    assert resumed.id == found.id
    assert sorted({row["trainer/global_step"] for row in resumed.rows}) == [10, 12]
    assert resumed.summary["best_val"] == summary(one)["best_val"]
    tables = sorted(folders(one)[-1].glob("files/media/table/*.json"))
    assert [row[0] for row in json.loads(tables[-1].read_text())["data"]] == [4, 8, 12]


def test_a_failed_run_is_marked_and_an_online_run_without_a_key_is_refused(
    minigpt: Callable[..., Outcome], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert minigpt(*FIT, "--data.path", text_file, "--run_dir", tmp_path / "r", "--model.lr", 1e30).status == 3
    found = read(*folders(tmp_path / "r"))
    assert found.exit_code == 1
    assert found.summary["stop_reason"] == "diverged"
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    done = minigpt(*FIT, "--data.path", text_file, "--run_dir", tmp_path / "live", "--wandb.offline", "false")
    assert done.status == 2
    assert done.err == "error: --wandb.offline false: W&B has no API key; run wandb login, or leave it out\n"
    assert not (tmp_path / "live").exists()
    monkeypatch.setenv("WANDB_MODE", "online")
    done = minigpt(*FIT, "--data.path", text_file, "--run_dir", tmp_path / "live")
    assert "WANDB_MODE online in the environment: W&B has no API key" in done.err


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_a_wandb_that_cannot_be_imported_costs_one_line(
    broken: bool, minigpt: Callable[..., Outcome], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken:
        (tmp_path / "site" / "wandb").mkdir(parents=True)
        (tmp_path / "site" / "wandb" / "__init__.py").write_text("import json\njson.of_another_version\n")
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        monkeypatch.syspath_prepend(tmp_path / "site")
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    done = minigpt(*FIT, "--data.path", text_file, "--run_dir", tmp_path / "r")
    assert (done.status, done.err.count("\n")) == (2, 1)
    cause = "AttributeError: module 'json' has no" if broken else "ModuleNotFoundError: "
    assert done.err.startswith(f"error: W&B cannot be imported ({cause}")
    assert done.err.endswith("; correct this, or train without W&B by --wandb null\n")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("zebras\n" * 900)], ids=["gone", "other"])
def test_a_run_takes_what_it_needs_of_its_text_at_the_start(
    change: Callable[[Path], Any], minigpt: Callable[..., Outcome], tmp_path: Path, text_file: Path
) -> None:
    expected = split_baselines(TextDataModule(path=str(text_file), train_frac=0.98, block_size=1, batch_size=1,
                                              eval_every=1))  # fmt: skip
    run = tmp_path / "r"
    with at_micro_batch(1, lambda: change(text_file)):
        done = minigpt(*FIT, "--data.path", text_file, "--run_dir", run)
    assert done.status == 0, done.err
    found = read(*folders(run))
    assert {row["baseline/xz"] for row in found.rows if "baseline/xz" in row} == {expected["xz"]["nats_per_char"]}
    assert found.summary["final_val_loss"] is not None
    state = read_checkpoint(run / "best.ckpt")["TextDataModule"]
    assert state["text_path"] == str(text_file)
    assert state["text_sha256"] == found.summary["data_sha256"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no such names")
def test_names_that_are_not_utf_8_train_without_wandb_and_tensorboard(
    minigpt: Callable[..., Outcome], tmp_path: Path, text_file: Path
) -> None:
    """A directory, a text and a run named café in Latin-1."""
    place = tmp_path / os.fsdecode(b"caf\xe9")
    place.mkdir()
    text, run = place / os.fsdecode(b"caf\xe9.txt"), place / os.fsdecode(b"run\xe9")
    text_file.rename(text)
    for more, refusal in (
        ((), "error: W&B takes no name or path that is not UTF-8; use another one, or train without W&B by"),
        (("--run_dir", tmp_path / "plain"), "error: W&B takes no name or path that is not UTF-8; "),  # the text's
        (("--wandb", "null", "--tensorboard", "true"), "error: --run_dir "),
    ):
        done = minigpt(*FIT, "--data.path", text, "--run_dir", run, *more)
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert done.err.startswith(refusal)
        assert not run.exists()
        assert not (tmp_path / "plain").exists()
    done = minigpt(*FIT, "--data.path", text, "--run_dir", run, "--wandb", "null")
    assert done.status == 0, done.err
    assert read_checkpoint(run / "best.ckpt")["TextDataModule"]["text_path"] == str(text)
    done = minigpt("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 10)
    assert done.status == 0, done.err
    for command in ("validate", "predict"):
        done = minigpt(command, "--run_dir", run, "--ckpt_path", "best")
        assert (done.status, done.err) == (0, "")
    done = minigpt("export", "--run_dir", run, "--out", place / "out")
    assert done.status == 0, done.err
    again = minigpt("fit", "-c", run / "config.yaml", "--run_dir", place / "again")
    assert again.status == 0, again.err


def test_variables_label_a_run_and_neither_the_next_one_nor_its_fork(
    minigpt: Callable[..., Outcome], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay in the run's configuration, which a resume keeps; only the mode follows the machine."""
    fit = (*FIT, "--data.path", text_file, "--samples", "null")
    labels = {"NAME": "n", "ENTITY": "e", "PROJECT": "p", "RUN_GROUP": "g", "JOB_TYPE": "j", "TAGS": "a,b"}
    with monkeypatch.context() as patch:
        for name, text in labels.items():
            patch.setenv(f"WANDB_{name}", text)
        patch.setenv("WANDB_RUN_ID", "chosen")
        assert minigpt(*fit, "--wandb.job_type", "flag", "--run_dir", tmp_path / "one").status == 0
        assert os.environ["WANDB_TAGS"] == "a,b"
    first = read(*folders(tmp_path / "one"))
    assert (first.id, first.name, first.entity, first.project) == ("chosen", "n", "e", "p")
    assert (first.group, first.job_type, first.tags) == ("g", "flag", ["a", "b"])
    stored = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text("utf-8"))["wandb"]
    assert (stored["name"], stored["group"], stored["job_type"], stored["id"]) == ("n", "g", "flag", None)

    assert minigpt(*fit, "--run_dir", tmp_path / "two", "--wandb.tags", "c", "--wandb.entity", "f").status == 0
    second = read(*folders(tmp_path / "two"))
    assert (second.name, second.entity, second.group, second.tags) == ("two", "f", "", ["c"])

    resume = ("fit", "--run_dir", tmp_path / "one", "--ckpt_path", "last", "--trainer.max_steps")
    monkeypatch.setenv("WANDB_RUN_GROUP", "other")
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    assert minigpt(*resume, 10).err == "trainer.max_steps: 8 -> 10\n"
    resumed = read(folders(tmp_path / "one")[-1])
    assert (resumed.id, resumed.name, resumed.group) == ("chosen", "n", "g")
    assert minigpt(*resume, 12, "--wandb.id", "mine").status == 0
    assert read(folders(tmp_path / "one")[-1]).id == "mine"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "wandb: {" in minigpt(*resume, 14).err
    assert len(folders(tmp_path / "one")) == 3

    fork = ("--ckpt_path", tmp_path / "two" / "best.ckpt", "--run_dir", tmp_path / "fork", "--trainer.max_steps", 16)
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    monkeypatch.delenv("WANDB_RUN_ID")
    assert minigpt("fit", *fork).status == 0
    forked = read(*folders(tmp_path / "fork"))
    assert (forked.id in (second.id, "other"), forked.tags, forked.group) == (False, ["c"], "other")


@pytest.mark.parametrize(("layers", "experts", "expected"), [(3, 10, 30), (4, 8, 8), (16, 4, 2)])
def test_many_experts_give_a_limited_number_of_metrics(layers: int, experts: int, expected: int) -> None:
    sizes = {"vocab_size": 7, "n_layer": layers, "n_head": 1, "n_embd": 8, "block_size": 4, "n_experts": experts}
    model = ModernLM(lr=1e-3, dropout=0.0, weight_decay=0.0, **sizes)
    model.net(torch.zeros(1, 4, dtype=torch.long))
    routing = torch.stack([torch.stack(moe.last_routing) for moe in model.net.moe_layers() if moe.last_routing])
    loads = {name: value for name, value in expert_metrics(routing).items() if name.startswith("moe/load_")}
    assert len(loads) == expected <= MAX_LOAD_METRICS
    assert max(loads.values()) == 1.0  # four equal tokens choose one expert


def test_wandb_is_imported_by_a_fit_that_uses_it_only() -> None:
    """No file of the package imports it at top level, which would slow down every command."""
    for path in PROJECT.glob("minigpt_pl/**/*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "wandb" for name in names), path.name


def test_the_page_and_the_workspace_name_every_panel() -> None:
    page = (PROJECT / "docs" / "wandb.md").read_text("utf-8")
    sections = yaml.safe_load((PROJECT / "docs" / "wandb-workspace.yaml").read_text("utf-8"))["sections"]
    shown = {section["name"]: [key for panel in section["panels"] for key in panel["keys"]] for section in sections}
    for panel, names in PANELS.items():
        for name in names - LOADS:
            assert f"`{name}`" in page
            assert name in shown[panel]
