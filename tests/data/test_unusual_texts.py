"""Unusual texts: each is tokenized with both tokenizers, and trained on and continued through the command line."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Outcome

from minigpt_pl import load_checkpoint
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.token_cache import SPLITS
from minigpt_pl.data.tokenizer import load_tokenizer


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


def config(path: Path, kind: str) -> dict[str, Any]:
    vocab_size = len(set(path.read_text("utf-8-sig"))) + 30
    return {"path": path, "tokenizer": kind, "bpe_vocab_size": vocab_size, "max_eval_tokens": 400, "eval_every": 2}


@pytest.fixture(params=TEXTS)
def unusual(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A file, and the text in it."""
    path, text = tmp_path / "text.txt", plain(TEXTS[request.param])
    path.write_bytes(TEXTS[request.param])
    return path, text


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_text_is_tokenized_and_restored(unusual: tuple[Path, str], kind: str) -> None:
    path, text = unusual
    data = TextDataModule(**config(path, kind), block_size=16, batch_size=2)
    tokenizer = data.tokenizer
    assert "".join(tokenizer.decode(data.tokens(split).tolist()) for split in SPLITS) == text
    assert {c for token in tokenizer.vocabulary for c in token} == set(text)
    if kind == "bpe":
        assert len(set(text)) < len(tokenizer.vocabulary) <= data.config.bpe_vocab_size
        assert load_tokenizer(tokenizer.dump()).encode(text).tolist() == tokenizer.encode(text).tolist()


def test_a_text_is_trained_on_and_continued(minigpt: Callable[..., Outcome], unusual: tuple[Path, str]) -> None:
    path, text = unusual
    kind = ("char", "bpe")[[plain(data) for data in TEXTS.values()].index(text) % 2]  # one is enough: both were tested
    options = [word for name, value in config(path, kind).items() for word in (f"--data.{name}", value)]
    sizes = ("--model.n_layer", 1, "--model.n_embd", 8, "--model.block_size", 16, "--trainer.max_steps", 2)
    best = path.parent / "r" / "best.ckpt"
    fitted = minigpt("fit", *TINY, *options, *sizes, "--run_dir", best.parent)
    assert fitted.status == 0, fitted.err
    assert "val/loss" in fitted.out
    assert load_checkpoint(best).tokenizer.kind == kind

    prompt, length = text[:5], ("--sample.max_new_tokens", 20)
    sampled = minigpt("predict", "--ckpt_path", best, f"--sample.prompt={prompt}", *length)
    assert sampled.status == 0, sampled.err
    assert sampled.out.startswith(prompt)
    assert set(sampled.out[len(prompt) :]) <= set(text) | {"\n"}
    assert len(sampled.out) >= len(prompt) + 20
