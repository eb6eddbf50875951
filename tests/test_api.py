"""From Python: a checkpoint loaded, a text continued and scored as the command line does it."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, Outcome

import minigpt_pl
from minigpt_pl import generate, load_checkpoint, score
from minigpt_pl.__main__ import main
from minigpt_pl.api import LoadedModel
from minigpt_pl.runtime.errors import UserError

TEXT = "".join(f"line {i}: the sea comes in,\n the 海 goes öut 🌊.\n" for i in range(60))
VAL = TEXT[int(0.9 * len(TEXT)) :]


@pytest.fixture(scope="module", params=["char", "bpe"])
def best(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best checkpoint of a short run on TEXT."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    settings = (
        "--data.path",
        folder / "text.txt",
        "--data.train_frac",
        0.9,
        "--data.tokenizer",
        request.param,
        "--data.bpe_vocab_size",
        80,
    )
    assert main([str(word) for word in ("fit", *TINY, *settings, "--run_dir", folder / "r")]) == 0
    return folder / "r" / "best.ckpt"


@pytest.fixture
def loaded(best: Path) -> LoadedModel:
    return load_checkpoint(best)


def test_the_score_of_the_val_part_is_what_validate_finds(
    best: Path, loaded: LoadedModel, minigpt: Callable[..., Outcome]
) -> None:
    scores = score(loaded, VAL)
    figures = {
        name: float(value) for name, value in map(str.split, minigpt("validate", "--ckpt_path", best).out.splitlines())
    }
    nats = math.fsum(nat for _, nat in scores)
    text = "".join(token for token, _ in scores)
    assert VAL.endswith(text)
    assert loaded.tokenizer.encode(VAL).tolist()[1:] == loaded.tokenizer.encode(text).tolist()
    assert nats == pytest.approx(figures["val/loss"] * len(scores), rel=1e-5)
    assert nats == pytest.approx(figures["val/nats_per_char"] * len(text), rel=1e-5)
    assert nats == pytest.approx(figures["val/bits_per_byte"] * math.log(2) * len(text.encode()), rel=1e-5)


def test_a_score_is_the_likelihood_of_a_token_given_those_before_it_in_its_window(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode(TEXT[:300])
    window = torch.from_numpy(ids.astype("int64"))[: loaded.model.block_size]
    with torch.no_grad():
        logits = loaded.model(window[None])[0][0]
    by_hand = -logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]]
    found = score(loaded, TEXT[:300])
    assert [nat for _, nat in found][: len(window) - 1] == pytest.approx(by_hand.tolist(), abs=1e-5)
    assert [token for token, _ in found] == [loaded.tokenizer.vocabulary[i] for i in ids[1:]]


@pytest.mark.parametrize("text", ["", "l"])
def test_a_text_of_no_more_than_a_token_has_nothing_to_score(loaded: LoadedModel, text: str) -> None:
    assert score(loaded, text) == []


@pytest.mark.parametrize("prompt", ["the sea", ""])
def test_generate_is_predict(best: Path, loaded: LoadedModel, minigpt: Callable[..., Outcome], prompt: str) -> None:
    options = {"max_new_tokens": 70, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3, "num_samples": 2}
    words = [f"--sample.{name}={value}" for name, value in options.items()]
    shown = minigpt("predict", "--ckpt_path", best, "--sample.prompt", prompt, *words)
    texts = generate(loaded, prompt, **options)
    assert shown.out == "\n---\n".join((prompt or "\n") + text for text in texts) + "\n"
    assert texts[0] != texts[1]


def test_five_lines_are_enough(best: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of the module's docstring, as it stands."""
    example = "\n".join(line[4:] for line in (minigpt_pl.api.__doc__ or "").splitlines() if line.startswith("    "))
    assert len([line for line in example.splitlines() if line]) <= 5
    exec(example.replace("runs/first/best.ckpt", str(best)).replace("Hello, world.", "the sea").replace("Hello", "the"))
    *text, nats = capsys.readouterr().out.splitlines()
    assert text
    assert float(nats) > 0


def test_what_the_model_never_saw_is_named(loaded: LoadedModel) -> None:
    for use in (generate, score):
        with pytest.raises(UserError, match="never saw 'Z'"):
            use(loaded, "Z")


def test_a_tokenizer_that_was_exchanged_is_noticed(best: Path, tmp_path: Path) -> None:
    saved = torch.load(best, weights_only=True)
    text = saved["TextDataModule"]
    text["tokenizer"] = text["tokenizer"].replace("s", "S")
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="tokenizer differs from its hash"):
        load_checkpoint(tmp_path / "other.ckpt")
