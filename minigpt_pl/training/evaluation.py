"""From what the steps of an evaluation return to its metrics, and how the experts of a model were used.

The steps are in `language_model`; which windows they read is decided in the data module.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MeanMetric

from minigpt_pl.data.datasets import EvalDataset
from minigpt_pl.models.gpt import GPT, token_cross_entropy

MAX_LOAD_METRICS = 30  # with two more about experts this is what one panel can show
EvalOutputs = list[tuple[Tensor, Tensor]]
"""Of each batch: nats of each window (B,), and counts as in `data.datasets.EvalBatch`, or tokens and draws (B, 2)."""


def eval_metrics(outputs: list[EvalOutputs], split: str, eval_mode: str, strategy: Any) -> dict[str, float]:
    """The metrics of an evaluation under their logged names.

    Args:
        outputs: Those of each loader.
        split: val or test.
        eval_mode: That of the TextDataModule, which says what its second loader reads; "" for other loaders.
        strategy: Lightning's, which collects from all devices.
    """
    first, *others = outputs
    metrics = mean_losses(first, split, strategy)
    for i, more in enumerate(others, 1):
        if eval_mode == "both":
            full = mean_losses(more, split, strategy)
            metrics |= {f"{split}/full_{name}": full[f"{split}/{name}"] for name in ("loss", "nats_per_char")}
        elif eval_mode == "sampled":  # as the reference report, which estimates the training split too
            metrics["train/eval_loss"] = mean_losses(more, "train", strategy)["train/loss"]
        else:
            metrics |= {f"{name}/dataloader_{i}": x for name, x in mean_losses(more, split, strategy).items()}
    return metrics


def mean_losses(outputs: EvalOutputs, split: str, strategy: Any) -> dict[str, float]:
    """Loss and perplexity, nats per character and bits per byte over all devices, summed in fp64 on the CPU.

    The last two need the numbers of characters and bytes, which the batches of a TextDataModule have.
    """
    nats, counts = (torch.cat(columns) for columns in zip(*outputs, strict=True))  # (windows,), (windows, 4 or 2)
    nats, counts = (strategy.all_gather(x).view(-1, *x.shape[1:]) for x in (nats, counts))
    nats = nats.cpu().double()
    means = []
    *columns, draws = counts.cpu().T
    for count in columns:  # tokens, characters, bytes
        # nan_strategy "disable" would keep a nan too, but ignores the weights.
        mean = MeanMetric(nan_strategy=math.nan, sync_on_compute=False).set_dtype(torch.float64)
        mean.update(nats / count.clamp(min=1), count * draws)
        means.append(mean.compute())
    loss, *per_text = means
    values = {"loss": loss}
    if per_text:
        values |= {"nats_per_char": per_text[0], "bits_per_byte": per_text[1] / math.log(2)}
    values["perplexity"] = loss.exp()
    return {f"{split}/{name}": value.float().item() for name, value in values.items()}


def expert_metrics(routing: Tensor) -> dict[str, float]:
    """How the experts were used: entropy of the router, experts without tokens, load.

    The load is logged for each expert; where that is too many, for the extremes of each layer, or of all layers.

    Args:
        routing: Of each layer, each expert's share of the token-expert pairs and its mean probability, (layers, 2, E).
    """
    shares, probabilities = routing.cpu().unbind(1)  # (layers, E) each
    entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1).mean()
    metrics = {"moe/entropy": entropy.item(), "moe/dead_experts": float((shares == 0).sum())}
    layers = list(enumerate(shares.tolist()))
    loads = {f"moe/load_{layer}_{expert}": share for layer, row in layers for expert, share in enumerate(row)}
    if len(loads) > MAX_LOAD_METRICS:
        loads = {f"moe/load_{layer}_{of.__name__}": of(row) for layer, row in layers for of in (max, min)}
    if len(loads) > MAX_LOAD_METRICS:
        loads = {"moe/load_max": shares.max().item(), "moe/load_min": shares.min().item()}
    return metrics | loads


@torch.inference_mode()
def token_nats(model: GPT, ids: NDArray[np.integer], token_lengths: NDArray[np.int64]) -> list[float]:
    """The negative log-likelihood in nats of each token but the first, in the windows of a full evaluation.

    Args:
        model: In eval mode.
        ids: Token ids (N,).
        token_lengths: Characters and bytes of each token of the vocabulary, (V, 2).
    """
    size, device = model.block_size, model.token_embedding.weight.device
    batches = EvalDataset(ids, token_lengths, size, 16, np.arange(0, len(ids) - 1, size))
    nats: list[float] = []
    for batch in (batches[i] for i in range(len(batches))):
        losses = token_cross_entropy(model(batch.inputs.to(device))[0], batch.targets.to(device)).cpu()
        nats += losses[batch.targets >= 0].tolist()
    return nats
