"""A new model that starts from the weights of a checkpoint, whose vocabulary may be another one.

Which options the new run takes from the checkpoint is decided in `cli.initial_weights`.
"""

from typing import Any

import torch

from minigpt_pl.data.tokenizer import Tokenizer, load_tokenizer
from minigpt_pl.training.language_model import LanguageModel

ROWS_OF_TOKENS = ("net.token_embedding.", "net.head.")
"""The parameters that have a row for each token."""


@torch.no_grad()
def copy_weights(model: LanguageModel, checkpoint: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, int]:
    """Copies a checkpoint's weights into a model of the same sizes; rows of tokens that it lacks stay as they are.

    Args:
        model: As initialised.
        checkpoint: From `read_checkpoint`.
        tokenizer: That of the model. A token of both vocabularies is one that spells the same text.

    Returns:
        How many tokens' rows were copied, and how many were not.
    """
    text = checkpoint["TextDataModule"]
    old_ids = {
        token: i for i, token in enumerate(load_tokenizer(text["tokenizer"], text["tokenizer_sha256"]).vocabulary)
    }
    shared = [(i, old_ids[token]) for i, token in enumerate(tokenizer.vocabulary) if token in old_ids]
    new_rows, old_rows = ([pair[side] for pair in shared] for side in (0, 1))
    weights = model.state_dict()  # shares its memory with the parameters
    for name, weight in checkpoint["state_dict"].items():
        if name.startswith(ROWS_OF_TOKENS):
            weights[name][new_rows] = weight[old_rows]
        else:
            weights[name].copy_(weight)
    return len(shared), len(tokenizer.vocabulary) - len(shared)
