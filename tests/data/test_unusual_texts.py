"""Texts of unusual kinds: each is trained on and continued, with both tokenizers, through the command line."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, Outcome

from minigpt_pl import load_checkpoint


def plain(data: bytes) -> str:
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def words(count: int) -> str:
    """The same few words in some order."""
    return " ".join(random.Random(0).choices(["the", "sea", "comes", "in", "and", "goes", "out", "again"], k=count))


PLANES = [chr(i) for i in [*range(0x3400, 0x3400 + 20_000), *range(0x20000, 0x20000 + 10_000)]]
TEXTS = {
    "mixed scripts, emoji, combining marks": "The sea, море, 海, الب\u064eحر, e\u0301té 👩‍👩‍👧 🌊\ufe0f.\n".encode()
    * 30,
    "two characters": "".join(random.Random(0).choices("ab", k=700)).encode(),
    "one line": words(14_000)[:60_000].encode(),
    "Windows line ends and a BOM": b"\xef\xbb\xbf" + b"The sea comes in,\r\nthe sea goes out.\r\n" * 30,
    "NUL and control characters": b"a\x00b\x01c\x1b[0m\x7f\x0b\x0c\t\r\xc2\x85\xe2\x80\xa8 the sea\n" * 40,
    "30,000 characters": "".join(PLANES[:40] * 20 + PLANES).encode(),
}


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_learned_and_continued(minigpt: Callable[..., Outcome], tmp_path: Path, name: str, kind: str) -> None:
    path, text = tmp_path / "text.txt", plain(TEXTS[name])
    path.write_bytes(TEXTS[name])
    assert len(set(text)) == {"two characters": 2, "30,000 characters": 30_000}.get(name, len(set(text)))
    vocab_size = len(set(text)) + 30
    options = ("--data.tokenizer", kind, "--data.bpe_vocab_size", vocab_size, "--data.path", path)
    sizes = ("--model.n_layer", 1, "--model.n_embd", 8, "--model.block_size", 16, "--data.max_eval_tokens", 400)
    steps = ("--trainer.max_steps", 2, "--data.eval_every", 2)
    fitted = minigpt("fit", *TINY, *options, *sizes, *steps, "--run_dir", tmp_path / "r")
    assert fitted.status == 0, fitted.err
    assert "val/loss" in fitted.out

    tokenizer = load_checkpoint(tmp_path / "r" / "best.ckpt").tokenizer
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert {c for token in tokenizer.vocabulary for c in token} == set(text)
    if kind == "bpe":
        assert len(set(text)) < len(tokenizer.vocabulary) <= vocab_size

    prompt = text[:5]
    sampled = minigpt(
        "predict",
        "--ckpt_path",
        tmp_path / "r" / "best.ckpt",
        f"--sample.prompt={prompt}",
        "--sample.max_new_tokens",
        20,
    )
    assert sampled.status == 0, sampled.err
    assert sampled.out.startswith(prompt)
    assert set(sampled.out[len(prompt) :]) <= set(text) | {"\n"}
    assert len(sampled.out) >= len(prompt) + 20
