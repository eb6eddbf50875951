"""The package from Python: load a checkpoint, continue a text, score a text.

    from minigpt_pl import generate, load_checkpoint, score

    loaded = load_checkpoint("runs/my-run/best.ckpt")
    print(generate(loaded, "Hello", max_new_tokens=100)[0])
    print(sum(nats for token, nats in score(loaded, "Hello, world.")))

The command line is in `cli`; both stand on the same rooms.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.data import tokenizer as tokenizers
from minigpt_pl.data.datasets import EvalDataset
from minigpt_pl.data.tokenizer import Tokenizer
from minigpt_pl.generation.generate import SamplingConfig
from minigpt_pl.generation.generate import generate as token_streams
from minigpt_pl.models.gpt import GPT, token_cross_entropy
from minigpt_pl.training.lit_modules import from_checkpoint


@dataclass
class LoadedModel:
    """A trained model in eval mode and the tokenizer that belongs to it."""

    model: GPT
    tokenizer: Tokenizer


def load_checkpoint(path: str | Path, device: str = "cpu") -> LoadedModel:
    """Reads a checkpoint; nothing in it is executed.

    Raises:
        InputError: If the file is missing, damaged or not a checkpoint of minigpt.
    """
    saved = read_checkpoint(path)
    text = saved["TextDataModule"]
    tokenizer = tokenizers.load_tokenizer(text["tokenizer"], text["tokenizer_sha256"])
    return LoadedModel(from_checkpoint(saved).net.to(device), tokenizer)


def generate(loaded: LoadedModel, prompt: str = "", **sampling: Any) -> list[str]:
    """Continues a prompt as `predict` does; one text, without the prompt, for each of `num_samples`.

    Args:
        loaded: From `load_checkpoint`.
        prompt: What to continue; a newline unless given, or the first token where the vocabulary has none.
        sampling: As `generation.SamplingConfig`: max_new_tokens, temperature, top_k, top_p, seed, num_samples.

    Raises:
        InputError: If the prompt has characters that the model never saw.
        ValueError: If a sampling setting is out of its range.
    """
    steps = token_streams(loaded.model, loaded.tokenizer.encode_prompt(prompt), SamplingConfig(**sampling))
    return [loaded.tokenizer.decode(list(stream)) for stream in zip(*steps, strict=True)]


@torch.inference_mode()
def score(loaded: LoadedModel, text: str) -> list[tuple[str, float]]:
    """Each token of a text but the first, which has no context, with its negative log-likelihood in nats.

    Windows are those of a full check: of the model's block_size tokens, each read by itself.

    Args:
        loaded: From `load_checkpoint`.
        text: Two tokens or more; a shorter one has nothing to score.

    Raises:
        InputError: If the text has characters that the model never saw.
    """
    ids, size = loaded.tokenizer.encode(text), loaded.model.block_size
    device = loaded.model.token_embedding.weight.device
    batches = EvalDataset(ids, loaded.tokenizer.token_lengths, np.arange(0, len(ids) - 1, size), size, batch_size=16)
    nats: list[float] = []
    for batch in (batches[i] for i in range(len(batches))):
        losses = token_cross_entropy(loaded.model(batch.inputs.to(device))[0], batch.targets.to(device)).cpu()
        nats += losses[batch.targets >= 0].tolist()
    return [(loaded.tokenizer.vocabulary[i], nat) for i, nat in zip(ids[1:].tolist(), nats, strict=True)]
