"""The exported folder, loaded by transformers alone: the same logits, token ids and greedy text, in one table."""

import json
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY
from support.tiny_models import build

from minigpt_pl import generate, load_checkpoint
from minigpt_pl.cli.export import export

transformers = pytest.importorskip("transformers", reason="the dev extra has it")

PLAIN = ("--model.conv_kernel_size", "0")
SPARSE = (*PLAIN, "--model.n_experts", "4")
KINDS = {
    "classic": ("--model", "ClassicLM"),
    "modern": (*PLAIN, "--model.tie_embeddings", "true"),
    "modern, untied": PLAIN,
    "moe, softmax_all": SPARSE,
    "moe, softmax_all, 2 of 4": (*SPARSE, "--model.moe_top_k", "2"),
    "moe, constant gate": (*SPARSE, "--model.moe_gate", "softmax_selected"),
    "moe, renormalised": (*SPARSE, "--model.moe_top_k", "2", "--model.moe_gate", "softmax_selected"),
    "bpe": (*PLAIN, "-c", "bpe"),
}
TABLE: list[str] = []


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same(kind, minigpt, tmp_path):
    """Trained, so that attention and routing are not near uniform."""
    run, out = tmp_path / "run", tmp_path / "hf"
    outcome = minigpt("fit", *TINY, *KINDS[kind], "--run_dir", run, "--model.lr", "0.02")
    assert outcome.status == 0, outcome.err
    outcome = minigpt("export", "--ckpt_path", run / "last.ckpt", "--out", out)
    assert outcome.status == 0, outcome.err
    ours = load_checkpoint(run / "last.ckpt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert type(theirs).__module__.startswith("transformers.")

    text = (PROJECT / "data" / "input.txt").read_text("utf-8")[:400]
    ids = ours.tokenizer.encode(text).tolist()
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text

    windows = torch.tensor(ids[: 4 * 32]).view(4, 32)
    with torch.no_grad():
        difference = (theirs(windows).logits - ours.model(windows)[0]).abs().max().item()
    assert difference < 1e-4

    prompt = text[:8]
    count = ours.model.block_size - len(ours.tokenizer.encode(prompt))
    (greedy,) = generate(ours, prompt, max_new_tokens=count, temperature=0)
    writer = transformers.pipeline("text-generation", model=theirs, tokenizer=tokenizer)
    written = writer(prompt, max_new_tokens=count, do_sample=False)[0]["generated_text"]
    assert written == prompt + greedy
    TABLE.append(f"{kind:28}{type(theirs).__name__:24}{difference:12.1e}   {len(ids)} ids equal   {count} tokens equal")


def test_the_table(capsys):
    with capsys.disabled():
        print("\nmodel                       layout                     logits by   ids            greedy text")
        print("\n".join(TABLE))
    assert len(TABLE) == len(KINDS)


def test_what_no_layout_has_is_refused(minigpt, tmp_path):
    class Rung(torch.nn.Module):
        pass

    from minigpt_pl.cli.export import layout_of
    from minigpt_pl.runtime.errors import UserError

    with pytest.raises(UserError, match="Rung has no layout"):
        layout_of(Rung())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="short convolutions: train with --model.conv_kernel_size 0"):
        layout_of(build("recipes"))
    layout_of(build("recipes", conv_kernel_size=0))


def test_a_folder_with_something_in_it_is_left_alone(minigpt, tmp_path):
    run, out = tmp_path / "run", tmp_path / "hf"
    minigpt("fit", *TINY, *PLAIN, "--run_dir", run)
    out.mkdir()
    (out / "config.json").write_text("mine")
    outcome = minigpt("export", "--ckpt_path", run / "best.ckpt", "--out", out)
    assert outcome.status == 2
    assert outcome.err == f"error: --out {out} is there already: name an empty or a new folder\n"
    assert [path.name for path in out.iterdir()] == ["config.json"]
    files = {path.name for path in export(Path(run / "best.ckpt"), tmp_path / "new")}
    best = json.loads((run / "summary.json").read_text())
    assert f"on its own text: {best['best_val']:.4f} nats/token" in (tmp_path / "new" / "README.md").read_text()
    minigpt("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 50, "--model.lr", 10)
    export(Path(run / "last.ckpt"), tmp_path / "last")
    assert "on its own text: not known" in (tmp_path / "last" / "README.md").read_text()  # the best is not the last
    assert files == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "llama"
