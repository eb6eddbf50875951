"""The GPTs as Lightning modules: loss, checks, update, and which settings may change under a checkpoint.

What a model computes is in `models`; what happens beside the loop in `callbacks`, `saving`, `stopping` and `loggers`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.checkpoint.validation import validate_sizes
from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.models.ablations import STAGES, Stage
from minigpt_pl.models.gpt import GPT, ClassicGPT, ModernGPT, token_cross_entropy
from minigpt_pl.models.moe import RouterGate
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.training.optim import LRSchedule, OptimizerName, build_optimizer, lr_factor

ROPE_THETA, RMS_NORM_EPS, FFN_MULT, MUON_LR = 10000.0, 1e-8, 2.5, 0.01


class LanguageModel(LightningModule, ABC):
    """A GPT that learns the next token; `ClassicLM` and `ModernLM` say which.

    Args:
        net: The model.
        lr: Peak learning rate; with muon, of all but Muon's matrices.
        weight_decay: On every parameter.
        lr_schedule: cosine, after a warm-up, or constant.
        optimizer: adamw, or muon for the matrices in the blocks and adamw for the rest.
        muon_lr: Peak learning rate of Muon's matrices.
        compile: Compile the model with torch.compile.
    """

    mutable_args: ClassVar[frozenset[str]] = frozenset(
        {"lr", "muon_lr", "weight_decay", "lr_schedule", "dropout", "compile"}
    )
    """Settings under which trained weights still compute the same function."""

    net: GPT

    @abstractmethod
    def __init__(
        self,
        net: GPT,
        lr: float,
        weight_decay: float,
        lr_schedule: LRSchedule,
        optimizer: OptimizerName,
        muon_lr: float,
        compile: bool,
    ):
        super().__init__()
        for name, rate in {"lr": lr, "muon_lr": muon_lr}.items():
            if not (rate > 0 and math.isfinite(rate)):
                raise UserError(f"model.{name} is {rate}: it must be positive")
        if not (weight_decay >= 0 and math.isfinite(weight_decay)):
            raise UserError(f"model.weight_decay is {weight_decay}: it must be 0 or positive")
        self.net = net
        self.lr, self.muon_lr, self.weight_decay = lr, muon_lr, weight_decay
        self.lr_schedule, self.optimizer_name = lr_schedule, optimizer
        if compile:
            self.net.compile()  # in place: the names in a checkpoint stay as they are
        self.stop_requested = False
        """Set by a callback at the end of a step: no further step is begun."""
        self.eval_metrics: dict[str, float] = {}
        """What the last check found, under the names that are logged."""
        self.sampling = SamplingConfig()
        self._eval_outputs: list[list[tuple[Tensor, Tensor]]] = []
        self.running_sums = torch.zeros(3)  # no buffer: DDP would overwrite it with the first process's
        """Losses, aux losses and gradient norms since they were last zeroed, on the device."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **settings: Any) -> Any:
        """The model of a checkpoint, in eval mode on the CPU; nothing in the file is executed.

        Args:
            checkpoint_path: The file.
            args: None; Lightning's other options do not apply.
            settings: Override the stored ones, for those that may change.

        Raises:
            InputError: If the file is no whole checkpoint, or one of another class.
        """
        assert not args, "name the settings"
        return from_checkpoint(read_checkpoint(checkpoint_path), cls, **settings)

    # Training.

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.net, self.lr, self.weight_decay, self.optimizer_name)

    def on_fit_start(self) -> None:
        self.running_sums = torch.zeros(3, device=self.device)

    def on_train_start(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:  # those of a checkpoint may be outdated
            group["weight_decay"] = self.weight_decay

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if self.stop_requested:
            return -1  # Lightning's word for: no more steps
        trainer = self.trainer  # looks for it each time
        factor = lr_factor(self.lr_schedule, trainer.global_step, trainer.max_steps)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = factor * (self.muon_lr if group.get("use_muon") else self.lr)
        return None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        logits, aux = self.net(inputs)
        loss = token_cross_entropy(logits, targets).mean()
        self.running_sums[:2].add_(torch.stack([loss, aux]).detach())
        return self.total_loss(loss, aux)

    def total_loss(self, loss: Tensor, aux: Tensor) -> Tensor:
        """What is minimised: the cross-entropy, unless an heir adds to it."""
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own clipping keeps the norm to itself; it is logged, and tells of divergence.
        limit = math.inf if gradient_clip_val is None else gradient_clip_val
        parameters = [p for group in optimizer.param_groups for p in group["params"]]  # every one, found faster
        self.running_sums[2].add_(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def is_finite(self) -> bool:
        """Whether the losses and gradients since the last reading, and all weights, are finite numbers."""
        weights = [p.detach().float().sum() for p in self.net.parameters()]
        return bool(torch.cat([self.running_sums, torch.stack(weights)]).isfinite().all())

    # Checks.

    def sequence_nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood in nats of each window's targets, (B,), in fp32."""
        return token_cross_entropy(self.net(inputs)[0], targets).sum(-1)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs, targets, counts = batch
        while len(self._eval_outputs) <= dataloader_idx:
            self._eval_outputs.append([])
        self._eval_outputs[dataloader_idx].append((self.sequence_nll(inputs, targets), counts))

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_eval("val")

    def on_test_epoch_end(self) -> None:
        self._log_eval("test")

    def _log_eval(self, part: str) -> None:
        tallies, self._eval_outputs = self._eval_outputs, []
        self.eval_metrics = self._aggregate(tallies[0], part)
        if len(tallies) > 1:  # the seed document's method estimates the train part too
            self.eval_metrics["train/eval_loss"] = self._aggregate(tallies[1], "train")["train/loss"]
        self.log_dict(self.eval_metrics, logger=False, sync_dist=self.trainer.world_size > 1)

    def _aggregate(self, tally: list[tuple[Tensor, Tensor]], part: str) -> dict[str, float]:
        """Loss, nats per character, bits per byte and perplexity over all devices; counted in fp64 on the CPU."""
        nats, counts = (torch.cat(columns) for columns in zip(*tally, strict=True))
        if self.trainer.world_size > 1:
            nats, counts = (self.trainer.strategy.all_gather(x).flatten(0, 1) for x in (nats, counts))
        nats = nats.cpu().double()
        means = []
        for count in counts.cpu().T:  # tokens, characters, bytes
            # nan stays nan; "disable" would say so too, but drops the weights
            mean = MeanMetric(nan_strategy=math.nan, sync_on_compute=False).set_dtype(torch.float64)
            mean.update(nats / count.clamp(min=1), count)
            means.append(mean.compute())
        loss, per_character, per_byte = means
        values = {
            "loss": loss,
            "nats_per_char": per_character,
            "bits_per_byte": per_byte / math.log(2),
            "perplexity": loss.exp(),
        }
        return {f"{part}/{name}": value.float().item() for name, value in values.items()}

    def extra_metrics(self) -> dict[str, float]:
        """What only this kind of model has to log about the last step."""
        return {}

    # Text.

    def predict_step(self, batch: list[int], batch_idx: int) -> Iterator[list[int]]:
        return generate(self.net, batch, self.sampling)


class ClassicLM(LanguageModel):
    """GPT-2's decoder, small: learned positions, LayerNorm, GELU.

    Args:
        vocab_size: Follows the tokenizer.
        lr: Peak learning rate; with muon, of all but Muon's matrices.
        dropout: On embeddings, attention probabilities and both branches of a block.
        weight_decay: On every parameter.
        n_layer: Blocks.
        n_head: Attention heads; must divide n_embd.
        n_embd: Width.
        block_size: Tokens of context.
        lr_schedule: cosine, after a warm-up, or constant.
        optimizer: adamw, or muon for the matrices in the blocks and adamw for the rest.
        muon_lr: Peak learning rate of Muon's matrices.
        compile: Compile the model with torch.compile.
    """

    def __init__(
        self,
        vocab_size: int,
        lr: float,
        dropout: float,
        weight_decay: float,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        block_size: int = 256,
        lr_schedule: LRSchedule = "cosine",
        optimizer: OptimizerName = "muon",
        muon_lr: float = MUON_LR,
        compile: bool = False,
    ):
        net = ClassicGPT(vocab_size, block_size, n_layer, n_head, n_embd, dropout, seed=torch.initial_seed())
        super().__init__(net, lr, weight_decay, lr_schedule, optimizer, muon_lr, compile)


class AblationLM(LanguageModel):
    """A step between ClassicLM and ModernLM, for the study of what each part brings; see `ladder`.

    Args:
        vocab_size: Follows the tokenizer.
        lr: Peak learning rate; with muon, of all but Muon's matrices.
        dropout: On embeddings, attention probabilities and both branches of a block.
        weight_decay: On every parameter.
        stage: The last part that is modern: each has those before it too.
        n_layer: Blocks.
        n_head: Attention heads; must divide n_embd.
        n_embd: Width.
        block_size: Tokens of context.
        lr_schedule: cosine, after a warm-up, or constant.
        optimizer: adamw, or muon for the matrices in the blocks and adamw for the rest.
        muon_lr: Peak learning rate of Muon's matrices.
        compile: Compile the model with torch.compile.
    """

    def __init__(
        self,
        vocab_size: int,
        lr: float,
        dropout: float,
        weight_decay: float,
        stage: Stage = "classic",
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        block_size: int = 256,
        lr_schedule: LRSchedule = "cosine",
        optimizer: OptimizerName = "muon",
        muon_lr: float = MUON_LR,
        compile: bool = False,
    ):
        net = STAGES[stage](
            vocab_size, block_size, n_layer, n_head, n_embd, dropout, ROPE_THETA, RMS_NORM_EPS, FFN_MULT,
            seed=torch.initial_seed(),
        )  # fmt: skip
        super().__init__(net, lr, weight_decay, lr_schedule, optimizer, muon_lr, compile)


class ModernLM(LanguageModel):
    """Llama's decoder, small: RMSNorm, RoPE, SwiGLU; with n_experts a sparse mixture of experts.

    Args:
        vocab_size: Follows the tokenizer.
        lr: Peak learning rate; with muon, of all but Muon's matrices.
        dropout: On embeddings, attention probabilities and both branches of a block.
        weight_decay: On every parameter.
        n_layer: Blocks.
        n_head: Attention heads; must divide n_embd.
        n_embd: Width.
        block_size: Tokens of context.
        rope_theta: Base of the rotary wavelengths.
        rms_norm_eps: Added to the mean square under the root.
        ffn_mult: Hidden width of a feed-forward net, or of one expert, in units of n_embd.
        n_experts: Experts in each block; 0 for one dense net.
        moe_top_k: Experts that a token chooses.
        moe_gate: softmax_all lets the router learn from the text; softmax_selected at moe_top_k 1 does not.
        moe_aux_loss_coef: Weight of the balance loss in what is minimised.
        tie_embeddings: Use the embedding as the head.
        zero_init: Begin each branch of a block, and an untied head, at 0.
        conv_kernel_size: Positions that a short convolution before each branch adds up; 0 for none.
        lr_schedule: cosine, after a warm-up, or constant.
        optimizer: adamw, or muon for the matrices in the blocks and adamw for the rest.
        muon_lr: Peak learning rate of Muon's matrices.
        compile: Compile the model with torch.compile.
    """

    mutable_args = LanguageModel.mutable_args | {"moe_aux_loss_coef"}

    def __init__(
        self,
        vocab_size: int,
        lr: float,
        dropout: float,
        weight_decay: float,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        block_size: int = 256,
        rope_theta: float = ROPE_THETA,
        rms_norm_eps: float = RMS_NORM_EPS,
        ffn_mult: float = FFN_MULT,
        n_experts: int = 0,
        moe_top_k: int = 1,
        moe_gate: RouterGate = "softmax_all",
        moe_aux_loss_coef: float = 0.0015,
        tie_embeddings: bool = False,
        zero_init: bool = True,
        conv_kernel_size: int = 4,
        lr_schedule: LRSchedule = "cosine",
        optimizer: OptimizerName = "muon",
        muon_lr: float = MUON_LR,
        compile: bool = False,
    ):
        net = ModernGPT(
            vocab_size, block_size, n_layer, n_head, n_embd, dropout, rope_theta, rms_norm_eps, ffn_mult,
            n_experts, moe_top_k, moe_gate, torch.initial_seed(), tie_embeddings, zero_init, conv_kernel_size,
        )  # fmt: skip
        super().__init__(net, lr, weight_decay, lr_schedule, optimizer, muon_lr, compile)
        if not (moe_aux_loss_coef >= 0 and math.isfinite(moe_aux_loss_coef)):
            raise UserError(f"model.moe_aux_loss_coef is {moe_aux_loss_coef}: it must be 0 or positive")
        self.moe_aux_loss_coef = moe_aux_loss_coef

    def total_loss(self, loss: Tensor, aux: Tensor) -> Tensor:
        return loss + self.moe_aux_loss_coef * aux

    def extra_metrics(self) -> dict[str, float]:
        """Entropy and dead experts; the load of each, or where these are many, the extremes of each layer or of all."""
        routings = [moe.last_routing for moe in self.net.moe_layers() if moe.last_routing is not None]
        if not routings:
            return {}
        shares, probabilities = (torch.stack(parts).cpu() for parts in zip(*routings, strict=True))  # (layers, E)
        entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1).mean()
        figures = {"moe/entropy": entropy.item(), "moe/dead_experts": float((shares == 0).sum())}
        layers = list(enumerate(shares.tolist()))
        loads = {f"moe/load_{layer}_{expert}": share for layer, row in layers for expert, share in enumerate(row)}
        if len(loads) > MAX_LOAD_METRICS:
            loads = {f"moe/load_{layer}_{of.__name__}": of(row) for layer, row in layers for of in (max, min)}
        if len(loads) > MAX_LOAD_METRICS:
            loads = {"moe/load_max": shares.max().item(), "moe/load_min": shares.min().item()}
        return figures | loads


MAX_LOAD_METRICS = 30  # with two more about experts they still make a panel that can be read
MODELS = {cls.__name__: cls for cls in (ClassicLM, ModernLM, AblationLM)}


def from_checkpoint(
    saved: dict[str, Any], expected: type[LanguageModel] = LanguageModel, **settings: Any
) -> LanguageModel:
    """The model of a checkpoint that `read_checkpoint` has read, in eval mode on the CPU.

    Args:
        saved: The checkpoint.
        expected: The class it must be of.
        settings: Override the stored ones, for those that may change.

    Raises:
        InputError: If it is of another class, or another setting is given.
    """
    validate_sizes(saved, MODELS)
    model = saved["settings"]["model"]
    cls = MODELS[model["class_path"].rpartition(".")[2]]
    if not issubclass(cls, expected):
        raise UserError(f"the checkpoint holds a {cls.__name__}, not a {expected.__name__}")
    if fixed := settings.keys() - cls.mutable_args:
        known = ", ".join(sorted(cls.mutable_args))
        raise UserError(f"{', '.join(sorted(fixed))}: of a trained {cls.__name__} only {known} may change")
    built = cls(**{**model["init_args"], **settings, "vocab_size": saved["vocab_size"]})
    built.load_state_dict(saved["state_dict"])
    return built.eval()
