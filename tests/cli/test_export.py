"""The exported folder, loaded by transformers alone: equal logits, token ids and greedy text, for each layout."""

import inspect
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import PROJECT, TINY
from safetensors.torch import save_file
from support.tiny_models import build, lively, some_ids

from minigpt_pl import generate, load_checkpoint
from minigpt_pl.__main__ import main
from minigpt_pl.cli.export import export, layout_of
from minigpt_pl.cli.import_folder import load_weights
from minigpt_pl.cli.own_layout import MODELING_FILE, modeling_source, own_layout
from minigpt_pl.models.ablations import AblationGPT
from minigpt_pl.models.attention import rotary_cos_sin
from minigpt_pl.models.blocks import SwiGLU
from minigpt_pl.models.config import Stage
from minigpt_pl.models.moe import MoE
from minigpt_pl.runtime.errors import UserError

transformers = pytest.importorskip("transformers", reason="it is in the dev extra")

PLAIN = ("--model.conv_kernel_size", "0", "--model.qk_norm", "false", "--model.attention_every", "1")
SPARSE = (*PLAIN, "--model.n_experts", "4")
CLASSIC_AS_TORCH = (
    "--model", "ClassicLM", "--model.gelu", "exact", "--model.weight_init", "torch",
    "--model.attention_output_dropout", "false",
)  # fmt: skip
NATIVE_KINDS = {
    "classic": ("--model", "ClassicLM"),
    "classic, torch's parts": CLASSIC_AS_TORCH,
    "modern": (*PLAIN, "--model.tie_embeddings", "true"),
    "modern, untied": PLAIN,
    "moe, softmax_all": SPARSE,
    "moe, softmax_all, 2 of 4": (*SPARSE, "--model.moe_top_k", "2"),
    "moe, constant gate": (*SPARSE, "--model.moe_gate", "softmax_selected"),
    "moe, renormalised": (*SPARSE, "--model.moe_top_k", "2", "--model.moe_gate", "softmax_selected"),
    "bpe": (*PLAIN, "-c", "bpe"),
}
OWN_KINDS = {
    "default": (),
    "default, bpe": ("-c", "bpe"),
    "default, tied": ("--model.tie_embeddings", "true", "--model.conv_kernel_size", "1"),
    "default, moe": ("--model.n_experts", "4"),
    "qk_norm": (*PLAIN, "--model.qk_norm", "true", "--model.rms_norm_eps", "0.1"),
    "attention_every": ("--model.attention_every", "2", "--model.n_layer", "4"),
    "attention_every, plain": (*PLAIN, "--model.attention_every", "2"),
    "classic": ("--model", "ClassicLM"),
    "classic, torch's parts": CLASSIC_AS_TORCH,
    "modern": PLAIN,
    "moe, renormalised": (*SPARSE, "--model.moe_top_k", "2", "--model.moe_gate", "softmax_selected"),
    **{f"stage {stage}": ("--model", "AblationLM", "--model.stage", stage) for stage in get_args(Stage)},
}
KINDS = [(kind, True) for kind in NATIVE_KINDS] + [(kind, False) for kind in OWN_KINDS]
OPTIONAL = {"default", "default, bpe", "default, tied", "default, moe", "qk_norm"}
OPTIONAL |= {"attention_every", "attention_every, plain"}
"""Kinds for which --native false is the only way, so that it may be left out."""
TABLE: list[str] = []


@pytest.fixture(autouse=True)
def no_code_from_the_home(tmp_path_factory, monkeypatch):
    """transformers copies a folder's code into the user's cache and imports it there."""
    cache = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])


def text_ids(loaded):
    """A part of the text, and its token ids."""
    text = (PROJECT / "data" / "input.txt").read_text("utf-8")[:400]
    return text, loaded.tokenizer.encode(text).tolist()


@pytest.mark.parametrize(("kind", "native"), KINDS)
def test_transformers_computes_the_same(kind, native, minigpt, tmp_path):
    """The model is trained, so that attention and routing are not near uniform."""
    run, out = tmp_path / "run", tmp_path / "hf"
    options = (NATIVE_KINDS if native else OWN_KINDS)[kind]
    outcome = minigpt("fit", *TINY, *options, "--run_dir", run, "--model.lr", "0.02")
    assert outcome.status == 0, outcome.err
    assert "to export a model" not in outcome.err
    chosen = () if native or kind in OPTIONAL else ("--native", "false")
    outcome = minigpt("export", "--ckpt_path", run / "last.ckpt", "--out", out, *chosen)
    assert outcome.status == 0, outcome.err
    loaded = load_checkpoint(run / "last.ckpt")
    exported = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=not native)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert type(exported).__module__.startswith("transformers." if native else "transformers_modules.")

    text, ids = text_ids(loaded)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text

    windows = torch.tensor(ids[: 4 * 32]).view(4, 32)
    with torch.no_grad():
        difference = (exported(windows).logits - loaded.model(windows)[0]).abs().max().item()
    assert difference < 1e-5

    prompt = text[:8]
    count = loaded.model.block_size - len(loaded.tokenizer.encode(prompt))
    count += 0 if native else 2 * loaded.model.block_size  # the folder's own code also knows what follows the window
    (greedy,) = generate(loaded, prompt, max_new_tokens=count, temperature=0)
    source = {"model": exported, "tokenizer": tokenizer} if native else {"model": str(out), "trust_remote_code": True}
    pipeline = transformers.pipeline("text-generation", **source)
    text_by_transformers = pipeline(prompt, max_new_tokens=count, do_sample=False)[0]["generated_text"]
    assert text_by_transformers == prompt + greedy

    outcome = minigpt("import", out, "--out", tmp_path / "back.ckpt")
    assert (outcome.status, outcome.err) == (0, "")
    back = load_checkpoint(tmp_path / "back.ckpt")
    assert all(map(torch.equal, back.model.state_dict().values(), loaded.model.state_dict().values()))
    assert back.tokenizer.sha256 == loaded.tokenizer.sha256
    assert generate(back, prompt, max_new_tokens=60, seed=3) == generate(loaded, prompt, max_new_tokens=60, seed=3)
    TABLE.append(
        f"{kind:26}{type(exported).__name__:24}{difference:10.1e}   {len(ids)} ids equal   {count} tokens equal"
    )


def test_the_table(capsys):
    with capsys.disabled():
        print("\nmodel                     layout                   logits by   ids            greedy text")
        print("\n".join(TABLE))
    assert len(TABLE) == len(KINDS)


@pytest.mark.parametrize("kind", ["classic", "recipes", "mixtral"])
def test_padding_beams_and_a_missing_cache_change_nothing(kind, tmp_path):
    """Of the folder's own code. Its short convolutions must not read padding, nor another beam's positions."""
    model = lively(kind)
    config, weights = own_layout(model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / MODELING_FILE).write_text(modeling_source("test"))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "model.safetensors")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)

    def continued(ids, **options):
        return exported.generate(ids, max_new_tokens=9, do_sample=False, **options)[:, ids.size(1) :]

    short, long = some_ids(1, 4), some_ids(1, 7, seed=2)
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    assert torch.equal(continued(padded, attention_mask=mask), torch.cat([continued(short), continued(long)]))
    assert torch.equal(continued(long), continued(long, use_cache=False))
    assert torch.equal(continued(long, num_beams=3), continued(long, num_beams=3, use_cache=False))
    with torch.no_grad():
        assert torch.equal(exported(padded, attention_mask=mask.new_ones(2, 7)).logits, exported(padded).logits)


WITHOUT_PROJECT = """
import sys

import transformers

try:
    import minigpt_pl.models
except ModuleNotFoundError:
    write = transformers.pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
    print(write("The sea", max_new_tokens=60, do_sample=False)[0]["generated_text"])
"""


def test_a_folder_is_used_where_this_project_is_missing(minigpt, tmp_path):
    """A Python in which minigpt_pl cannot be imported, with the packages of this one."""
    run, out = tmp_path / "run", tmp_path / "hf"
    assert minigpt("fit", *TINY, "--run_dir", run, "--model.lr", "0.02").status == 0
    assert minigpt("export", "--run_dir", run, "--out", out).status == 0
    # -S leaves out .pth files, so an editable install of this project, whose site-packages hold its shipped files only.
    environment = {
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-S", "-c", WITHOUT_PROJECT, str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (text,) = generate(load_checkpoint(run / "best.ckpt"), "The sea", max_new_tokens=60, temperature=0)
    assert done.stdout == f"The sea{text}\n"


def test_the_exported_code_is_the_projects_own():
    """Its layers are the sources of the project, and it imports nothing of it."""
    source = modeling_source("0")
    for part in (MoE, SwiGLU, rotary_cos_sin):
        assert inspect.getsource(part) in source
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"torch", "transformers", "typing", "collections", "math"}


def test_a_model_without_a_layout_is_refused(minigpt, tmp_path):
    native = "leave out --native true: the folder then brings its own code"
    with pytest.raises(UserError, match=f"transformers has no layout for AblationGPT; {native}"):
        layout_of(AblationGPT.__new__(AblationGPT), native=True)
    with pytest.raises(UserError, match=f"transformers has no layout with short convolutions; {native}"):
        layout_of(build("recipes"), native=True)
    with pytest.raises(UserError, match=f"transformers has no layout with blocks without attention; {native}"):
        layout_of(build("dense", attention_every=2), native=True)
    assert layout_of(build("recipes"), native=None)[0]["model_type"] == "minigpt"
    assert layout_of(build("recipes", conv_kernel_size=0), native=None)[0]["model_type"] == "llama"
    with pytest.raises(UserError, match="only models of minigpt_pl can be exported, not AnotherGPT"):
        layout_of((another := type("AnotherGPT", (AblationGPT,), {})).__new__(another), native=None)


def test_fit_no_longer_says_that_the_default_model_cannot_be_exported(minigpt, tmp_path):
    assert minigpt("fit", *TINY, "--run_dir", tmp_path / "run").err == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported run of the default model, and its run directory."""
    home = tmp_path_factory.mktemp("exported")
    text = home / "text.txt"
    text.write_text("".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(80)), "utf-8")
    args = ("fit", *TINY, "--data.path", text, "--run_dir", home / "run", "--data.train_frac", "0.9")
    assert main([str(arg) for arg in args]) == 0
    assert main(["export", "--run_dir", str(home / "run"), "--out", str(home / "hf")]) == 0
    return home


def test_an_imported_checkpoint_is_evaluated_and_continued_as_the_run(folder, minigpt, tmp_path):
    imported, best = tmp_path / "new" / "back.ckpt", folder / "run" / "best.ckpt"
    outcome = minigpt("import", folder / "hf", "--out", imported)
    assert (outcome.status, outcome.out, outcome.err) == (0, f"{imported}\n", "")
    path = ("--data.path", folder / "text.txt")
    results = [minigpt("validate", "--ckpt_path", one, *path) for one in (best, imported)]
    assert results[0].out == results[1].out != ""
    results = [minigpt("predict", "--ckpt_path", one, "--sample.prompt", "line 3") for one in (best, imported)]
    assert results[0].out == results[1].out != ""
    outcome = minigpt("fit", "--ckpt_path", imported, "--run_dir", tmp_path / "fork")
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: --ckpt_path {imported}: minigpt fit did not write it: predict and validate")
    assert minigpt("export", "--ckpt_path", imported, "--out", tmp_path / "again").status == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "hf" / "model.safetensors").read_bytes()
    assert str(folder) not in (folder / "hf" / "config.json").read_text(), "paths stay at home"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda hf: (hf / "config.json").unlink(), "config.json cannot be read (No such file or directory)"),
        (
            lambda hf: (hf / "config.json").write_text("{}"),
            "minigpt export did not write it: its config.json has no entry minigpt",
        ),
        (
            lambda hf: (hf / "tokenizer.json").write_text((hf / "tokenizer.json").read_text().replace('"l"', '"L"')),
            "its tokenizer.json is not the exported one",
        ),
        (
            lambda hf: save_file({"norm.weight": torch.ones(3)}, hf / "model.safetensors"),
            "its weights are those of another model: blocks.0.conv_2.weight",
        ),
        (lambda hf: (hf / "model.safetensors").write_bytes(b"torn"), "a file cannot be read ("),
    ],
)
def test_a_folder_that_is_not_an_exported_model_is_refused(folder, minigpt, tmp_path, change, line):
    changed = tmp_path / "hf"
    shutil.copytree(folder / "hf", changed)
    change(changed)
    outcome = minigpt("import", changed, "--out", tmp_path / "back.ckpt")
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: import {changed}: {line}")
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "back.ckpt").exists()


def test_biases_that_were_trained_in_transformers_are_not_lost_silently():
    """Qwen2-MoE has parameters that this project's models do not: zeros in an export."""
    model = lively("switch")
    weights = {name: weight.clone() for name, weight in layout_of(model, native=True)[1].items()}
    assert load_weights(build("switch"), weights, native=True) == ""
    weights["model.layers.0.self_attn.q_proj.bias"][0] = 1
    problem = load_weights(build("switch"), weights, native=True)
    assert problem == "model.layers.0.self_attn.q_proj.bias has values that the model has no place for"


def test_a_folder_with_files_is_not_overwritten(minigpt, tmp_path):
    run, out = tmp_path / "run", tmp_path / "hf"
    minigpt("fit", *TINY, *PLAIN, "--run_dir", run)
    out.mkdir()
    (out / "config.json").write_text("mine")
    outcome = minigpt("export", "--ckpt_path", run / "best.ckpt", "--out", out)
    assert outcome.status == 2
    assert outcome.err == f"error: --out {out}: it exists already; name an empty or a new folder\n"
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert minigpt("import", out, "--out", run / "best.ckpt").err.startswith("error: --out ")  # it exists too
    files = {path.name for path in export(Path(run / "best.ckpt"), tmp_path / "new")}
    best = json.loads((run / "summary.json").read_text())
    assert f"split of this text: {best['best_val']:.4f} nats/token" in (tmp_path / "new" / "README.md").read_text()
    minigpt("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 50, "--model.lr", 10)
    assert minigpt("export", "--run_dir", run, "--ckpt_path", "last", "--out", tmp_path / "last").status == 0
    assert minigpt("export", "--run_dir", run, "--out", tmp_path / "best").status == 0
    cards = [(tmp_path / name / "README.md").read_text() for name in ("new", "best", "last")]
    assert cards[0] == cards[1] != cards[2]
    assert "split of this text: not known" in (tmp_path / "last" / "README.md").read_text()  # best is not last
    assert files == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "llama"
