"""`fit --init_from`: what a new run takes from a checkpoint, and what of it is refused."""

from pathlib import Path

import pytest
import torch
from conftest import TINY
from support.runs import SMALL, at_micro_batch, differences, interrupt, rows_of, summary

from minigpt_pl import ModernLM, load_checkpoint
from minigpt_pl.__main__ import main
from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.data.tokenizer import BPETokenizer, CharTokenizer
from minigpt_pl.training.fine_tuning import copy_weights

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "dropout": 0.0, "lr": 1.0, "weight_decay": 0.0}
NEW_RUN = (
    "--wandb", "null", "--samples", "null", "--data.batch_size", 4, "--data.eval_every", 5, "--trainer.max_steps", 16,
    "--trainer.log_every_n_steps", 3, "--checkpoint.every_n_train_steps", 4, "--trainer.enable_progress_bar", "false",
)  # fmt: skip


def model(alphabet: str, seed: int, **options: object) -> ModernLM:
    torch.manual_seed(seed)
    lm = ModernLM(**SIZES, **options, vocab_size=len(alphabet))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return lm


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_copied_by_token_and_new_ones_stay_as_initialised(tied: bool) -> None:
    old, new = model("abcde", 1, tie_embeddings=tied), model("Xbdfa", 2, tie_embeddings=tied)
    before = {name: weight.clone() for name, weight in new.state_dict().items()}
    tokenizer = CharTokenizer("abcde")
    text = {"tokenizer": tokenizer.dump(), "tokenizer_sha256": tokenizer.sha256}
    assert copy_weights(new, {"state_dict": old.state_dict(), "TextDataModule": text}, CharTokenizer("Xbdfa")) == (3, 2)
    for name, weight in new.state_dict().items():
        source = old.state_dict()[name]
        if not name.startswith(("net.token_embedding", "net.head")):
            assert torch.equal(weight, source), name
            continue
        for row, token in enumerate("Xabdf"):
            expected = source["abcde".index(token)] if token in "abcde" else before[name][row]
            assert torch.equal(weight[row], expected), (name, token)


def test_tokens_of_byte_pairs_are_found_by_their_text() -> None:
    old_tokens = BPETokenizer(["a", "b", "ab", "ba"], [("a", "b"), ("b", "a")])
    new_tokens = BPETokenizer(["a", "b", "c", "ba"], [("b", "a")])
    old, new = model("1234", 1), model("1234", 2)
    text = {"tokenizer": old_tokens.dump(), "tokenizer_sha256": old_tokens.sha256}
    assert copy_weights(new, {"state_dict": old.state_dict(), "TextDataModule": text}, new_tokens) == (3, 1)
    assert torch.equal(new.net.head.weight[3], old.net.head.weight[3])
    assert not torch.equal(new.net.head.weight[2], old.net.head.weight[2])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of its own sizes, and a second text that shares a part of its characters."""
    home = tmp_path_factory.mktemp("init_from")
    (home / "first.txt").write_text("the sea comes in, the sea goes out.\n" * 60, "utf-8")
    (home / "second.txt").write_text("The Zebra came in & went out!\n" * 60, "utf-8")
    args = ("fit", *SMALL, "--data.path", home / "first.txt", "--run_dir", home / "first")
    assert main([str(arg) for arg in args]) == 0
    return home


def test_a_run_starts_from_weights_alone_and_resumes_bit_exact(home: Path, minigpt, tmp_path: Path) -> None:
    start = home / "first" / "best.ckpt"
    options = ("fit", *NEW_RUN, "--data.path", home / "second.txt", "--init_from", start)
    outcome = minigpt(*options, "--run_dir", tmp_path / "straight")
    counts = "the rows of 12 tokens are copied, 7 tokens begin as in a new model"
    assert (outcome.status, outcome.err) == (0, f"init_from {start}: {counts}\n")
    result = summary(tmp_path / "straight")
    assert (result["total_steps"], result["tokens_seen"]) == (16, 16 * 4 * 16)
    assert result["config"]["init_from"] == str(start)
    assert (result["parent"], result["parent_step"]) == (str(start), read_checkpoint(start)["global_step"])
    sizes = result["config"]["model"]["init_args"]
    assert (sizes["n_embd"], sizes["block_size"], sizes["dropout"]) == (16, 16, 0.2), "sizes of the start, no dropout"

    lr = [row["lr"] for row in rows_of(tmp_path / "straight") if row["split"] == "train"]
    plain = ("--model.n_layer", 2, "--model.n_head", sizes["n_head"], "--model.n_embd", 16, "--model.block_size", 16)
    plain = (*NEW_RUN, *plain, "--data.path", home / "second.txt", "--run_dir", tmp_path / "plain")
    assert minigpt("fit", *plain).status == 0
    assert lr == [row["lr"] for row in rows_of(tmp_path / "plain") if row["split"] == "train"], "a schedule of its own"
    first, plain_first = (
        float(next(row["train/loss"] for row in rows_of(tmp_path / run) if row["split"] == "train"))
        for run in ("straight", "plain")
    )
    assert first < plain_first, "it begins with what the first run has learnt"

    with at_micro_batch(7, interrupt):
        assert minigpt(*options, "--run_dir", tmp_path / "stopped").status == 130
    outcome = minigpt("fit", "--run_dir", tmp_path / "stopped", "--ckpt_path", "last")
    assert (outcome.status, outcome.err) == (0, "")
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []

    repeated = minigpt("fit", "-c", tmp_path / "straight" / "config.yaml", "--run_dir", tmp_path / "repeated")
    assert counts in repeated.err
    assert differences(tmp_path / "straight", tmp_path / "repeated") == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--model.n_layer", 3), "--model.n_layer 3: {start} was trained with 2; leave it out: its weights have this"),
        (("--model", "ClassicLM"), "--model ClassicLM: {start} was trained with ModernLM; leave it out"),
        (("--model.tie_embeddings", "true"), "--model.tie_embeddings true: {start} was trained with False"),
    ],
)
def test_another_size_is_refused(home: Path, minigpt, tmp_path: Path, options, line: str) -> None:
    start = home / "first" / "best.ckpt"
    outcome = minigpt("fit", *NEW_RUN, "--init_from", start, *options, "--run_dir", tmp_path / "run")
    assert outcome.status == 2
    assert outcome.err.startswith("error: " + line.format(start=start))
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_is_no_start_is_refused(home: Path, minigpt, tmp_path: Path) -> None:
    missing = minigpt("fit", *TINY, "--init_from", tmp_path / "no.ckpt", "--run_dir", tmp_path / "run")
    assert missing.err.startswith(f"error: --init_from {tmp_path / 'no.ckpt'}: the file does not exist")
    last = ("--run_dir", home / "first", "--ckpt_path", "last", "--trainer.max_steps", 20)
    outcome = minigpt("fit", *last, "--init_from", home / "first" / "best.ckpt")
    assert outcome.err.startswith(f"error: --init_from {home / 'first' / 'best.ckpt'}: ")
    assert outcome.err.count("\n") == 1
    outcome = minigpt("predict", "--ckpt_path", home / "first" / "best.ckpt", "--init_from", "x.ckpt")
    assert outcome.err == "error: --init_from x.ckpt: only fit has this option; leave it out\n"


def test_a_run_starts_from_an_imported_checkpoint(home: Path, minigpt, tmp_path: Path) -> None:
    run, imported = home / "first", tmp_path / "imported.ckpt"
    assert minigpt("export", "--run_dir", run, "--out", tmp_path / "hf").status == 0
    assert minigpt("import", tmp_path / "hf", "--out", imported).status == 0
    options = (*NEW_RUN, "--data.path", home / "second.txt", "--trainer.max_steps", 4, "--data.eval_every", 4)
    runs = {"original": run / "best.ckpt", "imported": imported}
    for name, start in runs.items():
        assert minigpt("fit", *options, "--init_from", start, "--run_dir", tmp_path / name).status == 0
    weights = [load_checkpoint(tmp_path / name / "best.ckpt").model.state_dict() for name in runs]
    assert all(torch.equal(*pair) for pair in zip(*(w.values() for w in weights), strict=True))
