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

from minigpt_pl.checkpoint import read_checkpoint
from minigpt_pl.errors import InputError
from minigpt_pl.generation import Sampling, generate
from minigpt_pl.ladder import RUNGS, Rung
from minigpt_pl.models import GPT, ClassicGPT, ModernGPT, nll
from minigpt_pl.moe import Gate
from minigpt_pl.optim import Rule, Schedule, build_optimizer, lr_factor
from minigpt_pl.vetting import check_sizes_fit

ROPE_THETA, RMS_NORM_EPS, FFN_MULT, MUON_LR = 10000.0, 1e-8, 2.5, 0.01


class LanguageModel(LightningModule, ABC):
    """A GPT that learns the next token; `ClassicLM` and `ModernLM` say which.

    Args:
        net: The model.
        lr: Peak learning rate; with muon, of all but Muon's matrices.
        weight_decay: On every parameter.
        schedule: cosine, after a warm-up, or constant.
        optimizer: adamw, or muon for the matrices in the blocks and adamw for the rest.
        muon_lr: Peak learning rate of Muon's matrices.
        compile: Compile the model with torch.compile.
    """

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"lr", "muon_lr", "weight_decay", "schedule", "dropout", "compile"}
    )
    """Settings under which trained weights still compute the same function."""

    net: GPT

    @abstractmethod
    def __init__(
        self,
        net: GPT,
        lr: float,
        weight_decay: float,
        schedule: Schedule,
        optimizer: Rule,
        muon_lr: float,
        compile: bool,
    ):
        super().__init__()
        for name, rate in {"lr": lr, "muon_lr": muon_lr}.items():
            if not (rate > 0 and math.isfinite(rate)):
                raise InputError(f"model.{name} is {rate}: it must be positive")
        if not (weight_decay >= 0 and math.isfinite(weight_decay)):
            raise InputError(f"model.weight_decay is {weight_decay}: it must be 0 or positive")
        self.net = net
        self.lr, self.muon_lr, self.weight_decay = lr, muon_lr, weight_decay
        self.schedule, self.rule = schedule, optimizer
        if compile:
            self.net.compile()  # in place: the names in a checkpoint stay as they are
        self.stop_requested = False
        """Set by a callback at the end of a step: no further step is begun."""
        self.figures: dict[str, float] = {}
        """What the last check found, under the names that are logged."""
        self.sampling = Sampling()
        self._tallies: list[list[tuple[Tensor, Tensor]]] = []
        self.sums = torch.zeros(3)  # no buffer: DDP would overwrite it with the first process's
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
        return build_optimizer(self.net, self.lr, self.weight_decay, self.rule)

    def on_fit_start(self) -> None:
        self.sums = torch.zeros(3, device=self.device)

    def on_train_start(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:  # those of a checkpoint may be outdated
            group["weight_decay"] = self.weight_decay

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if self.stop_requested:
            return -1  # Lightning's word for: no more steps
        trainer = self.trainer  # looks for it each time
        factor = lr_factor(self.schedule, trainer.global_step, trainer.max_steps)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = factor * (self.muon_lr if group.get("orthogonalise") else self.lr)
        return None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        logits, aux = self.net(inputs)
        loss = nll(logits, targets).mean()
        self.sums[:2].add_(torch.stack([loss, aux]).detach())
        return self.whole_loss(loss, aux)

    def whole_loss(self, loss: Tensor, aux: Tensor) -> Tensor:
        """What is minimised: the cross-entropy, unless an heir adds to it."""
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own clipping keeps the norm to itself; it is logged, and tells of divergence.
        limit = math.inf if gradient_clip_val is None else gradient_clip_val
        parameters = [p for group in optimizer.param_groups for p in group["params"]]  # every one, found faster
        self.sums[2].add_(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def is_finite(self) -> bool:
        """Whether the losses and gradients since the last reading, and all weights, are finite numbers."""
        weights = [p.detach().float().sum() for p in self.net.parameters()]
        return bool(torch.cat([self.sums, torch.stack(weights)]).isfinite().all())

    # Checks.

    def nll_of_windows(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood in nats of each window's targets, (B,), in fp32."""
        return nll(self.net(inputs)[0], targets).sum(-1)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs, targets, counts = batch
        while len(self._tallies) <= dataloader_idx:
            self._tallies.append([])
        self._tallies[dataloader_idx].append((self.nll_of_windows(inputs, targets), counts))

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._close_check("val")

    def on_test_epoch_end(self) -> None:
        self._close_check("test")

    def _close_check(self, part: str) -> None:
        tallies, self._tallies = self._tallies, []
        self.figures = self._summarise(tallies[0], part)
        if len(tallies) > 1:  # the seed document's method estimates the train part too
            self.figures["train/eval_loss"] = self._summarise(tallies[1], "train")["train/loss"]
        self.log_dict(self.figures, logger=False, sync_dist=self.trainer.world_size > 1)

    def _summarise(self, tally: list[tuple[Tensor, Tensor]], part: str) -> dict[str, float]:
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

    def step_figures(self) -> dict[str, float]:
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
        schedule: cosine, after a warm-up, or constant.
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
        schedule: Schedule = "cosine",
        optimizer: Rule = "muon",
        muon_lr: float = MUON_LR,
        compile: bool = False,
    ):
        net = ClassicGPT(vocab_size, block_size, n_layer, n_head, n_embd, dropout, seed=torch.initial_seed())
        super().__init__(net, lr, weight_decay, schedule, optimizer, muon_lr, compile)


class LadderLM(LanguageModel):
    """A step between ClassicLM and ModernLM, for the study of what each part brings; see `ladder`.

    Args:
        vocab_size: Follows the tokenizer.
        lr: Peak learning rate; with muon, of all but Muon's matrices.
        dropout: On embeddings, attention probabilities and both branches of a block.
        weight_decay: On every parameter.
        rung: The last part that is modern: each has those before it too.
        n_layer: Blocks.
        n_head: Attention heads; must divide n_embd.
        n_embd: Width.
        block_size: Tokens of context.
        schedule: cosine, after a warm-up, or constant.
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
        rung: Rung = "classic",
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        block_size: int = 256,
        schedule: Schedule = "cosine",
        optimizer: Rule = "muon",
        muon_lr: float = MUON_LR,
        compile: bool = False,
    ):
        net = RUNGS[rung](
            vocab_size, block_size, n_layer, n_head, n_embd, dropout, ROPE_THETA, RMS_NORM_EPS, FFN_MULT,
            seed=torch.initial_seed(),
        )  # fmt: skip
        super().__init__(net, lr, weight_decay, schedule, optimizer, muon_lr, compile)


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
        tied_head: Use the embedding as the head.
        zero_init: Begin each branch of a block, and an untied head, at 0.
        conv_width: Positions that a short convolution before each branch adds up; 0 for none.
        schedule: cosine, after a warm-up, or constant.
        optimizer: adamw, or muon for the matrices in the blocks and adamw for the rest.
        muon_lr: Peak learning rate of Muon's matrices.
        compile: Compile the model with torch.compile.
    """

    may_change = LanguageModel.may_change | {"moe_aux_loss_coef"}

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
        moe_gate: Gate = "softmax_all",
        moe_aux_loss_coef: float = 0.0015,
        tied_head: bool = False,
        zero_init: bool = True,
        conv_width: int = 4,
        schedule: Schedule = "cosine",
        optimizer: Rule = "muon",
        muon_lr: float = MUON_LR,
        compile: bool = False,
    ):
        net = ModernGPT(
            vocab_size, block_size, n_layer, n_head, n_embd, dropout, rope_theta, rms_norm_eps, ffn_mult,
            n_experts, moe_top_k, moe_gate, torch.initial_seed(), tied_head, zero_init, conv_width,
        )  # fmt: skip
        super().__init__(net, lr, weight_decay, schedule, optimizer, muon_lr, compile)
        if not (moe_aux_loss_coef >= 0 and math.isfinite(moe_aux_loss_coef)):
            raise InputError(f"model.moe_aux_loss_coef is {moe_aux_loss_coef}: it must be 0 or positive")
        self.moe_aux_loss_coef = moe_aux_loss_coef

    def whole_loss(self, loss: Tensor, aux: Tensor) -> Tensor:
        return loss + self.moe_aux_loss_coef * aux

    def step_figures(self) -> dict[str, float]:
        """Entropy and dead experts; the load of each, or where these are many, the extremes of each layer or of all."""
        routings = [moe.last_routing for moe in self.net.moe_layers() if moe.last_routing is not None]
        if not routings:
            return {}
        shares, probabilities = (torch.stack(parts).cpu() for parts in zip(*routings, strict=True))  # (layers, E)
        entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1).mean()
        figures = {"moe/entropy": entropy.item(), "moe/dead_experts": float((shares == 0).sum())}
        layers = list(enumerate(shares.tolist()))
        loads = {f"moe/load_{layer}_{expert}": share for layer, row in layers for expert, share in enumerate(row)}
        if len(loads) > MOST_LOADS:
            loads = {f"moe/load_{layer}_{of.__name__}": of(row) for layer, row in layers for of in (max, min)}
        if len(loads) > MOST_LOADS:
            loads = {"moe/load_max": shares.max().item(), "moe/load_min": shares.min().item()}
        return figures | loads


MOST_LOADS = 30  # with two more about experts they still make a panel that can be read
MODELS = {f"{cls.__module__}.{cls.__name__}": cls for cls in (ClassicLM, ModernLM, LadderLM)}


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
    check_sizes_fit(saved, MODELS)
    model = saved["settings"]["model"]
    cls = MODELS[model["class_path"]]
    if not issubclass(cls, expected):
        raise InputError(f"the checkpoint holds a {cls.__name__}, not a {expected.__name__}")
    if fixed := settings.keys() - cls.may_change:
        known = ", ".join(sorted(cls.may_change))
        raise InputError(f"{', '.join(sorted(fixed))}: of a trained {cls.__name__} only {known} may change")
    built = cls(**{**model["init_args"], **settings, "vocab_size": saved["vocab_size"]})
    built.load_state_dict(saved["state_dict"])
    return built.eval()
