"""A trained checkpoint from Python: load it, continue a text, score a text.

    from minigpt_pl import generate, load_checkpoint, score

    loaded = load_checkpoint("runs/first/best.ckpt")
    print(generate(loaded, "Hello", max_new_tokens=100)[0])
    print(sum(nats for token, nats in score(loaded, "Hello, world.")))

The commands are in `cli`; both use the same rooms.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.data.tokenizer import Tokenizer, load_tokenizer
from minigpt_pl.generation.generate import SamplingConfig
from minigpt_pl.generation.generate import generate as generate_ids
from minigpt_pl.models.gpt import GPT
from minigpt_pl.training.evaluation import token_nats
from minigpt_pl.training.lit_modules import from_checkpoint


@dataclass
class LoadedModel:
    """A trained model in eval mode, and its tokenizer."""

    model: GPT
    tokenizer: Tokenizer


def load_checkpoint(path: str | Path, device: str = "cpu") -> LoadedModel:
    """Reads a checkpoint; nothing in it is executed.

    Raises:
        UserError: If the file is missing, damaged or not a checkpoint of minigpt.
    """
    checkpoint = read_checkpoint(path)
    text = checkpoint["TextDataModule"]
    tokenizer = load_tokenizer(text["tokenizer"], text["tokenizer_sha256"])
    return LoadedModel(from_checkpoint(checkpoint).net.to(device), tokenizer)


def generate(loaded: LoadedModel, prompt: str = "", **sampling: Any) -> list[str]:
    """Continues a prompt as `predict` does; returns one text, without the prompt, for each of `num_samples`.

    Args:
        loaded: From `load_checkpoint`.
        prompt: What to continue; an empty one means a newline, or the first token if the vocabulary has no newline.
        sampling: The arguments of `SamplingConfig`: max_new_tokens, temperature, top_k, top_p, seed, num_samples.

    Raises:
        UserError: If the prompt has characters that the vocabulary lacks.
        UserError: If a sampling argument is out of its range.
    """
    steps = generate_ids(loaded.model, loaded.tokenizer.encode_prompt(prompt), SamplingConfig(**sampling))
    return [loaded.tokenizer.decode(list(stream)) for stream in zip(*steps, strict=True)]


def score(loaded: LoadedModel, text: str) -> list[tuple[str, float]]:
    """Each token of a text with its negative log-likelihood in nats; the first token has no context and is left out.

    The windows are those of a full evaluation: block_size tokens, each window read by itself.

    Args:
        loaded: From `load_checkpoint`.
        text: At least two tokens; a shorter text has nothing to score.

    Raises:
        UserError: If the text has characters that the vocabulary lacks.
    """
    ids, vocabulary = loaded.tokenizer.encode(text), loaded.tokenizer.vocabulary
    nats = token_nats(loaded.model, ids, loaded.tokenizer.token_lengths)
    return [(vocabulary[i], nat) for i, nat in zip(ids[1:].tolist(), nats, strict=True)]
