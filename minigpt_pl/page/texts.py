"""What the page needs of a model's text: the validation split to read, and the training split to search for copies."""

from typing import Any

from minigpt_pl.data.baselines import MAX_BASELINE_CHARACTERS, split_baselines
from minigpt_pl.data.datamodule import TextDataModule

MAX_READ_TOKENS = 2**16
MAX_SEARCHED_CHARACTERS = 2_000_000


def read_text(data: TextDataModule) -> tuple[dict[str, Any], str]:
    """The beginning of the validation split, in token ids, and the end of the training split; raises as `read`."""
    ids = data.tokens("val")
    name = "validation text" if len(ids) <= MAX_READ_TOKENS else "beginning of the validation text"
    train = data.tokenizer.decode(data.tokens("train")[-MAX_SEARCHED_CHARACTERS:].tolist())
    return {"ids": ids[:MAX_READ_TOKENS].tolist(), "name": name}, train[-MAX_SEARCHED_CHARACTERS:]


def text_baselines(data: TextDataModule) -> dict[str, float] | None:
    """nats/char of n-grams and xz on the validation split; None where counting would take long. Raises as `read`."""
    if data.text_stats.characters > MAX_BASELINE_CHARACTERS:
        return None
    return {name: values["nats_per_char"] for name, values in split_baselines(data).items()}
