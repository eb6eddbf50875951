"""The exported folder, loaded by transformers alone: equal logits, token ids and greedy text, for each layout."""

import json
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import PROJECT, TINY
from support.tiny_models import build

from minigpt_pl import generate, load_checkpoint
from minigpt_pl.cli.export import export, layout_of
from minigpt_pl.models.ablations import AblationGPT
from minigpt_pl.models.config import Stage
from minigpt_pl.runtime.errors import UserError

transformers = pytest.importorskip("transformers", reason="it is in the dev extra")

PLAIN = ("--model.conv_kernel_size", "0")
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
    "classic": ("--model", "ClassicLM"),
    "classic, torch's parts": CLASSIC_AS_TORCH,
    "modern": PLAIN,
    "moe, renormalised": (*SPARSE, "--model.moe_top_k", "2", "--model.moe_gate", "softmax_selected"),
    **{f"stage {stage}": ("--model", "AblationLM", "--model.stage", stage) for stage in get_args(Stage)},
}
KINDS = [(kind, True) for kind in NATIVE_KINDS] + [(kind, False) for kind in OWN_KINDS]
OPTIONAL = {"default", "default, bpe", "default, tied", "default, moe"}
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


def test_a_model_without_a_layout_is_refused():
    with pytest.raises(UserError, match="transformers has no layout for AblationGPT"):
        layout_of(AblationGPT.__new__(AblationGPT))
    with pytest.raises(UserError, match="short convolutions; train with --model.conv_kernel_size 0"):
        layout_of(build("recipes"))
    layout_of(build("recipes", conv_kernel_size=0))


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            (),
            "to export a model, train with --model.conv_kernel_size 0: "
            "transformers has no layout with short convolutions",
        ),
        (
            ("--model", "AblationLM"),
            "to export a model, train a ClassicLM or a ModernLM: transformers has no layout for AblationGPT",
        ),
    ],
)
def test_fit_says_before_training_that_a_model_cannot_be_exported(args, line, minigpt, tmp_path):
    fit = ("fit", *TINY, *args, "--run_dir", tmp_path / "run")
    assert minigpt(*fit, "--data.path", "nothing.txt").err.startswith("error: ")
    assert minigpt(*fit).err == f"{line}\n"
    resumed = minigpt("fit", "--run_dir", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", 30)
    assert resumed.err == "trainer.max_steps: 20 -> 30\n"
    assert minigpt(*fit).err.count("\n") == 1  # an error alone: the directory holds a run


def test_a_folder_with_files_is_not_overwritten(minigpt, tmp_path):
    run, out = tmp_path / "run", tmp_path / "hf"
    minigpt("fit", *TINY, *PLAIN, "--run_dir", run)
    out.mkdir()
    (out / "config.json").write_text("mine")
    outcome = minigpt("export", "--ckpt_path", run / "best.ckpt", "--out", out)
    assert outcome.status == 2
    assert outcome.err == f"error: --out {out}: it exists already; name an empty or a new folder\n"
    assert [path.name for path in out.iterdir()] == ["config.json"]
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
