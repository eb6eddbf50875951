"""What every model of this project is for Lightning: its loss, its update, its metrics, and how it is loaded again.

The models themselves are in `lit_modules`; what their networks compute is in `models`. What happens beside the loop is
in `callbacks`, `checkpointing`, `stopping` and `loggers`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from minigpt_pl.checkpoint.io import read_checkpoint
from minigpt_pl.checkpoint.validation import validate_sizes
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.data.datasets import IGNORE_INDEX
from minigpt_pl.generation.generate import SamplingConfig, generate
from minigpt_pl.models.config import GPTConfig
from minigpt_pl.models.gpt import GPT, token_cross_entropy
from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.user_classes import import_path, is_own, register
from minigpt_pl.training.evaluation import eval_metrics, expert_metrics
from minigpt_pl.training.optim import OptimizerConfig, StepSchedule, build_optimizer
from minigpt_pl.training.patches import log_completed_steps, step_ended
from minigpt_pl.training.running_means import RunningMeans

MODELS: dict[str, type["LanguageModel"]] = {}
"""Every LanguageModel by its class name, those of the user included."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(OptimizerConfig, GPTConfig):
    """Sizes and training options of a LanguageModel.

    Args:
        compile: Compile the model with torch.compile.
    """

    compile: bool = False


class LanguageModel(LightningModule, ABC):
    """A GPT that learns to predict the next token. Its subclasses say which GPT.

    Args:
        net: The model.
        config: Its sizes and training options.
    """

    config_class: ClassVar[type[LanguageModelConfig]] = LanguageModelConfig
    mutable_args: ClassVar[frozenset[str]] = frozenset({
        "lr", "muon_lr", "weight_decay", "lr_schedule", "warmup_steps", "dropout", "attention_output_dropout",
        "compile", "moe_aux_loss_coef",
    })  # fmt: skip
    """Arguments that do not change what trained weights compute in eval mode."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        register(MODELS, cls)

    @abstractmethod
    def __init__(self, net: GPT, config: LanguageModelConfig):
        super().__init__()
        self.net, self.config = net, config
        self.save_hyperparameters(ignore=["net", "config", "_instantiator", "_class_path"])  # those of a subclass
        self.save_hyperparameters(asdict(config))
        if config.compile:
            self.net.compile()  # in place, so that the names in a checkpoint stay the same
        self.stop_requested = False
        """Set by a callback at the end of a step: no further step is started."""
        self.eval_metrics: dict[str, float] = {}
        """The metrics of the last evaluation, under their logged names."""
        self.sampling = SamplingConfig()
        """How `predict_step` chooses tokens."""
        self.on_new_tokens: Callable[[list[int]], None] | None = None
        """Called in `predict_step` with the next token of each sample, as soon as it is drawn."""
        self.minimised_loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        """Set by a callback: what is minimised in place of the cross-entropy, from it, the inputs and the logits."""
        self.running_means = RunningMeans()
        self._train_metrics: tuple[int, dict[str, float]] = (-1, {})
        self._last_lr = 0.0
        self._eval_outputs: list[list[tuple[Tensor, Tensor]]] = []

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = None, hparams_file: Any = None, *args: Any, **overrides: Any
    ) -> Any:
        """The model of a checkpoint in eval mode; nothing in the file is executed.

        Args:
            checkpoint_path: The file, written by the command line or by any checkpoint callback of Lightning.
            map_location: The device of the model; by default the CPU.
            hparams_file: None; the checkpoint holds the arguments of the model.
            args: None; give arguments by name.
            overrides: New values of arguments that may change.

        Raises:
            UserError: If the file is not a whole checkpoint, or holds another class.
        """
        assert hparams_file is None, "the checkpoint holds the arguments of the model"
        assert not args, "give the arguments by name"
        model = from_checkpoint(read_checkpoint(checkpoint_path), cls, **overrides)
        return model if map_location is None else model.to(map_location)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what builds the model again; the command line has added its whole configuration instead."""
        arguments, vocab_size = dict(self.hparams), self.config.vocab_size
        del arguments["vocab_size"]
        model = {"class_path": import_path(type(self)), "init_args": arguments}
        datamodule = getattr(self.trainer, "datamodule", None)
        data = dict(getattr(datamodule, "hparams", {}))
        seed = data.pop("seed", 0)
        data.pop("block_size", None)
        config = {"seed_everything": seed, "model": model, "data": data, "trainer": {}}
        if isinstance(datamodule, TextDataModule) and not is_own(type(datamodule)):
            config["data_class"] = import_path(type(datamodule))
        checkpoint |= {"config": checkpoint.get("config", config), "vocab_size": vocab_size}

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of the token that follows each position of ids (B, T)."""
        logits: Tensor = self.net(ids)[0]
        return logits

    # Training.

    def configure_optimizers(self) -> OptimizerLRScheduler:
        names = {field.name for field in fields(OptimizerConfig)} & self.hparams.keys()
        config = OptimizerConfig(**{name: self.hparams[name] for name in names})  # Lightning's tuners write there
        optimizer = build_optimizer(self.net, config)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": StepSchedule(optimizer, config), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        self.running_means.to(self.device)
        self.running_means.reset()
        self._train_metrics = (-1, {})  # an earlier fit may have ended at the same step
        log_completed_steps(self.trainer)

    def on_train_start(self) -> None:
        for schedule in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            if isinstance(schedule, StepSchedule):
                schedule.start(self.trainer.global_step, self.trainer.estimated_stepping_batches)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if not self.stop_requested:
            return None
        self.trainer.should_stop = True  # no further epoch either
        return -1  # Lightning's code for: no more steps in this epoch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch  # (B, T) each
        logits, aux_loss = self.net(inputs)
        loss = token_cross_entropy(logits, targets).mean()
        self.running_means.add_losses(loss, aux_loss)
        if routings := [torch.stack(moe.last_routing) for moe in self.net.moe_layers() if moe.last_routing]:
            self.running_means.add_routing(torch.stack(routings))
        if self.minimised_loss is not None:
            loss = self.minimised_loss(loss, inputs, logits)
        return self.total_loss(loss, aux_loss)

    def total_loss(self, loss: Tensor, aux_loss: Tensor) -> Tensor:
        """What is minimised: the cross-entropy; a subclass may add the balance loss."""
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own clipping discards the norm, which is logged here and shows divergence.
        by_value = gradient_clip_val is not None and gradient_clip_algorithm == "value"
        limit = math.inf if gradient_clip_val is None or by_value else gradient_clip_val
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.running_means.add_grad_norm(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if by_value:
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)  # type: ignore[arg-type]
        self._last_lr = optimizer.param_groups[-1]["lr"]  # under Muon, the last group is AdamW's

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.log_is_due():
            for name, value in self.train_metrics().items():
                precise, shown = torch.tensor(value, dtype=torch.float64), name == "train/loss"
                self.log(name, precise, on_step=True, on_epoch=False, prog_bar=shown)

    def on_train_epoch_end(self) -> None:
        if self.running_means.steps:  # a callback may monitor them where no logger writes them
            self.log_dict(self.train_metrics(), logger=False, sync_dist=self.trainer.world_size > 1)

    def log_is_due(self) -> bool:
        """Whether loggers write the training metrics of the micro-batch that has just ended: Lightning's own rule."""
        trainer: Any = self.trainer
        return step_ended(trainer) and (self._is_log_step() or trainer.should_stop or bool(trainer.fast_dev_run))

    def _is_log_step(self) -> bool:
        trainer: Any = self.trainer
        return trainer.log_every_n_steps > 0 and trainer.global_step % trainer.log_every_n_steps == 0

    def train_metrics(self) -> dict[str, float]:
        """The training metrics at the end of a step: means since the last log, over all devices.

        The same object for one step, so that a callback can add to it what is logged beside them.
        """
        step, metrics = self._train_metrics
        if step != self.trainer.global_step:
            loss, aux_loss, grad_norm = self.running_means.compute(self.trainer.strategy)
            metrics = {"train/loss": loss, "train/grad_norm": grad_norm, "lr": self._last_lr}
            if (routing := self.running_means.mean_routing(self.trainer.strategy)) is not None:
                metrics |= {"train/aux_loss": aux_loss} | expert_metrics(routing)
            self._train_metrics = (self.trainer.global_step, metrics)
            if self._is_log_step():
                self.running_means.reset()
        return metrics

    def is_finite(self) -> bool:
        """Whether the losses and gradient norms since the last log, and all weights, are finite."""
        weights = [p.detach().float().sum() for p in self.net.parameters()]
        return bool(torch.cat([self.running_means.sums, torch.stack(weights)]).isfinite().all())

    # Evaluation.

    def sequence_nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each window's targets (B, T), summed, (B,), in fp32."""
        return token_cross_entropy(self.net(inputs)[0], targets).sum(-1)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs, targets, *rest = batch
        scored = (targets != IGNORE_INDEX).sum(-1)
        counts = rest[0] if rest else torch.stack([scored, torch.ones_like(scored)], -1)  # each window drawn once
        while len(self._eval_outputs) <= dataloader_idx:
            self._eval_outputs.append([])
        self._eval_outputs[dataloader_idx].append((self.sequence_nll(inputs, targets), counts))

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_eval("val")

    def on_test_epoch_end(self) -> None:
        self._log_eval("test")

    def finish_evaluation(self, split: str) -> dict[str, float]:
        """Computes `eval_metrics` from the outputs of the evaluation that has just ended, and returns them."""
        if self._eval_outputs:
            outputs, self._eval_outputs = self._eval_outputs, []
            config = getattr(getattr(self.trainer, "datamodule", None), "config", None)
            self.eval_metrics = eval_metrics(outputs, split, getattr(config, "eval_mode", ""), self.trainer.strategy)
        return self.eval_metrics

    def _log_eval(self, split: str) -> None:
        several = self.trainer.world_size > 1
        self.log_dict(self.finish_evaluation(split), sync_dist=several)
        if self.trainer.state.fn == TrainerFn.FITTING and self.running_means.steps:  # a callback may monitor them here
            self.log_dict(self.train_metrics(), logger=False, sync_dist=several)

    # Generation.

    def predict_step(self, batch: list[int], batch_idx: int) -> list[list[int]]:
        """The tokens that continue a prompt of token ids, a list for each of `sampling.num_samples` samples."""
        steps = []
        for tokens in generate(self.net, batch, self.sampling):
            steps.append(tokens)
            if self.on_new_tokens is not None:
                self.on_new_tokens(tokens)
        return [list(sample) for sample in zip(*steps, strict=True)]


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
        known = ", ".join(sorted(cls.mutable_args & cls.config_class.__dataclass_fields__.keys()))
        raise UserError(f"{', '.join(sorted(fixed))}: of a trained {cls.__name__} only {known} may change")
    built = cls(**{**model["init_args"], **overrides, "vocab_size": saved["vocab_size"]})
    built.load_state_dict(saved["state_dict"])
    return built.eval()
