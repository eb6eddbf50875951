"""The GPTs as LightningModules: loss, evaluation, update, and which arguments may change for trained weights.

What a model computes is in `models`. What happens beside the loop is in `callbacks`, `checkpointing`, `stopping` and
`loggers`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.checkpoint.validation import validate_sizes
from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.models.ablations import STAGES
from minigpt_pl.models.config import AblationConfig, GPTConfig, ModernConfig
from minigpt_pl.models.gpt import GPT, ClassicGPT, ModernGPT, token_cross_entropy
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.ranges import NonNegativeFinite
from minigpt_pl.training.optim import OptimizerConfig, build_optimizer, lr_factor

MAX_LOAD_METRICS = 30  # with two more about experts this is what one panel can show


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(OptimizerConfig, GPTConfig):
    """Sizes and training options of a LanguageModel.

    Args:
        compile: Compile the model with torch.compile.
    """

    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class AblationLMConfig(AblationConfig, LanguageModelConfig):
    """Of AblationLM."""


@dataclass(frozen=True, kw_only=True)
class ModernLMConfig(ModernConfig, LanguageModelConfig):
    """Of ModernLM.

    Args:
        moe_aux_loss_coef: Weight of the experts' balance loss in training.
    """

    moe_aux_loss_coef: NonNegativeFinite = 0.0015


class LanguageModel(LightningModule, ABC):
    """A GPT that learns to predict the next token. Its subclasses say which GPT.

    Args:
        net: The model.
        config: Its sizes and training options.
    """

    config_class: ClassVar[type[LanguageModelConfig]] = LanguageModelConfig
    mutable_args: ClassVar[frozenset[str]] = frozenset(
        {"lr", "muon_lr", "weight_decay", "lr_schedule", "dropout", "compile", "moe_aux_loss_coef"}
    )
    """Arguments that do not change what trained weights compute in eval mode."""

    @abstractmethod
    def __init__(self, net: GPT, config: LanguageModelConfig):
        super().__init__()
        self.net, self.config = net, config
        if config.compile:
            self.net.compile()  # in place, so that the names in a checkpoint stay the same
        self.stop_requested = False
        """Set by a callback at the end of a step: no further step is started."""
        self.eval_metrics: dict[str, float] = {}
        """The metrics of the last evaluation, under their logged names."""
        self.sampling = SamplingConfig()
        self._eval_outputs: list[list[tuple[Tensor, Tensor]]] = []
        self.running_sums = torch.zeros(3)  # not a buffer: DDP would overwrite it with the first process's
        """Losses, balance losses and gradient norms since they were last set to zero, on the device."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **overrides: Any) -> Any:
        """The model of a checkpoint, in eval mode on the CPU; nothing in the file is executed.

        Args:
            checkpoint_path: The file.
            args: None; Lightning's other arguments do not apply.
            overrides: New values of arguments that may change.

        Raises:
            UserError: If the file is not a whole checkpoint, or holds another class.
        """
        assert not args, "give the arguments by name"
        return from_checkpoint(read_checkpoint(checkpoint_path), cls, **overrides)

    # Training.

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.net, self.config)

    def on_fit_start(self) -> None:
        self.running_sums = torch.zeros(3, device=self.device)

    def on_train_start(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:  # a checkpoint restores its own, maybe older, value
            group["weight_decay"] = self.config.weight_decay

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if self.stop_requested:
            return -1  # Lightning's code for: no more steps
        trainer = self.trainer  # the property searches for it each time
        factor = lr_factor(self.config.lr_schedule, trainer.global_step, trainer.max_steps)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = factor * (self.config.muon_lr if group.get("use_muon") else self.config.lr)
        return None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch  # (B, T) each
        logits, aux_loss = self.net(inputs)
        loss = token_cross_entropy(logits, targets).mean()
        self.running_sums[:2].add_(torch.stack([loss, aux_loss]).detach())
        return self.total_loss(loss, aux_loss)

    def total_loss(self, loss: Tensor, aux_loss: Tensor) -> Tensor:
        """What is minimised: the cross-entropy; a subclass may add the balance loss."""
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own clipping discards the norm, which is logged here and shows divergence.
        limit = math.inf if gradient_clip_val is None else gradient_clip_val
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.running_sums[2].add_(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def is_finite(self) -> bool:
        """Whether the losses and gradient norms since the last log, and all weights, are finite."""
        weights = [p.detach().float().sum() for p in self.net.parameters()]
        return bool(torch.cat([self.running_sums, torch.stack(weights)]).isfinite().all())

    # Evaluation.

    def sequence_nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each window's targets (B, T), summed, (B,), in fp32."""
        return token_cross_entropy(self.net(inputs)[0], targets).sum(-1)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs, targets, counts = batch
        while len(self._eval_outputs) <= dataloader_idx:
            self._eval_outputs.append([])
        self._eval_outputs[dataloader_idx].append((self.sequence_nll(inputs, targets), counts))

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_eval("val")

    def on_test_epoch_end(self) -> None:
        self._log_eval("test")

    def _log_eval(self, split: str) -> None:
        outputs, self._eval_outputs = self._eval_outputs, []
        trainer: Any = self.trainer
        self.eval_metrics = self._aggregate(outputs[0], split)
        if len(outputs) > 1 and trainer.datamodule.config.eval_mode == "both":
            full = self._aggregate(outputs[1], split)
            self.eval_metrics |= {f"{split}/full_{x}": full[f"{split}/{x}"] for x in ("loss", "nats_per_char")}
        elif len(outputs) > 1:  # eval_mode sampled estimates the training split too
            self.eval_metrics["train/eval_loss"] = self._aggregate(outputs[1], "train")["train/loss"]
        self.log_dict(self.eval_metrics, logger=False, sync_dist=trainer.world_size > 1)

    def _aggregate(self, outputs: list[tuple[Tensor, Tensor]], split: str) -> dict[str, float]:
        """Loss, nats per character, bits per byte and perplexity over all devices, summed in fp64 on the CPU."""
        nats, counts = (torch.cat(columns) for columns in zip(*outputs, strict=True))  # (windows,), (windows, 4)
        if self.trainer.world_size > 1:
            nats, counts = (self.trainer.strategy.all_gather(x).flatten(0, 1) for x in (nats, counts))
        nats = nats.cpu().double()
        means = []
        *columns, draws = counts.cpu().T
        for count in columns:  # tokens, characters, bytes
            # nan_strategy "disable" would keep a nan too, but ignores the weights.
            mean = MeanMetric(nan_strategy=math.nan, sync_on_compute=False).set_dtype(torch.float64)
            mean.update(nats / count.clamp(min=1), count * draws)
            means.append(mean.compute())
        loss, per_character, per_byte = means
        values = {
            "loss": loss,
            "nats_per_char": per_character,
            "bits_per_byte": per_byte / math.log(2),
            "perplexity": loss.exp(),
        }
        return {f"{split}/{name}": value.float().item() for name, value in values.items()}

    def extra_metrics(self) -> dict[str, float]:
        """Metrics of the last step that only some models have: entropy of the router, experts without tokens, load.

        The load is logged for each expert; where that is too many, for the extremes of each layer, or of all layers.
        """
        routings = [moe.last_routing for moe in self.net.moe_layers() if moe.last_routing is not None]
        if not routings:
            return {}
        shares, probabilities = (torch.stack(parts).cpu() for parts in zip(*routings, strict=True))  # (layers, E)
        entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1).mean()
        metrics = {"moe/entropy": entropy.item(), "moe/dead_experts": float((shares == 0).sum())}
        layers = list(enumerate(shares.tolist()))
        loads = {f"moe/load_{layer}_{expert}": share for layer, row in layers for expert, share in enumerate(row)}
        if len(loads) > MAX_LOAD_METRICS:
            loads = {f"moe/load_{layer}_{of.__name__}": of(row) for layer, row in layers for of in (max, min)}
        if len(loads) > MAX_LOAD_METRICS:
            loads = {"moe/load_max": shares.max().item(), "moe/load_min": shares.min().item()}
        return metrics | loads

    # Generation.

    def predict_step(self, batch: list[int], batch_idx: int) -> Iterator[list[int]]:
        return generate(self.net, batch, self.sampling)


class ClassicLM(LanguageModel):
    """GPT-2's decoder at a small size: learned positions, LayerNorm, GELU.

    Args:
        config: The arguments of LanguageModelConfig.
    """

    def __init__(self, **config: Any):
        args = LanguageModelConfig(**config)
        super().__init__(ClassicGPT(args, seed=torch.initial_seed()), args)


class AblationLM(LanguageModel):
    """A stage between ClassicLM and ModernLM, to study what each part contributes; see `models.ablations`.

    Args:
        config: The arguments of AblationLMConfig.
    """

    config_class = AblationLMConfig

    def __init__(self, **config: Any):
        args = AblationLMConfig(**config)
        super().__init__(STAGES[args.stage](args, seed=torch.initial_seed()), args)


class ModernLM(LanguageModel):
    """Llama's decoder at a small size: RMSNorm, RoPE, SwiGLU; with n_experts a sparse mixture of experts.

    Args:
        config: The arguments of ModernLMConfig.
    """

    config_class = ModernLMConfig
    config: ModernLMConfig

    def __init__(self, **config: Any):
        args = ModernLMConfig(**config)
        super().__init__(ModernGPT(args, seed=torch.initial_seed()), args)

    def total_loss(self, loss: Tensor, aux_loss: Tensor) -> Tensor:
        return loss + self.config.moe_aux_loss_coef * aux_loss


MODELS: dict[str, type[LanguageModel]] = {cls.__name__: cls for cls in (ClassicLM, ModernLM, AblationLM)}
"""By class name: import paths change when files move."""


def from_checkpoint(
    saved: dict[str, Any], expected: type[LanguageModel] = LanguageModel, **overrides: Any
) -> LanguageModel:
    """The model of a checkpoint that `read_checkpoint` has read, in eval mode on the CPU.

    Args:
        saved: The checkpoint.
        expected: The class that it must be of.
        overrides: New values of arguments that may change.

    Raises:
        UserError: If it is of another class, or another argument is overridden.
    """
    validate_sizes(saved, MODELS)
    model = saved["config"]["model"]
    cls = MODELS[model["class_path"].rpartition(".")[2]]
    if not issubclass(cls, expected):
        raise UserError(f"the checkpoint holds a {cls.__name__}, not a {expected.__name__}")
    if fixed := overrides.keys() - cls.mutable_args:
        known = ", ".join(sorted(cls.mutable_args))
        raise UserError(f"{', '.join(sorted(fixed))}: of a trained {cls.__name__} only {known} may change")
    args: dict[str, Any] = {**model["init_args"], **overrides, "vocab_size": saved["vocab_size"]}
    built = cls(**args)
    built.load_state_dict(saved["state_dict"])
    return built.eval()
