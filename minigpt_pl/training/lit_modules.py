"""The models as LightningModules, and the arguments of each; what they share is in `language_model`.

Import MODELS and `from_checkpoint` from here: then every model of this project is registered.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt_pl.models.ablations import STAGES
from minigpt_pl.models.config import AblationConfig, ClassicConfig, ModernConfig
from minigpt_pl.models.gpt import ClassicGPT, ModernGPT
from minigpt_pl.runtime.ranges import NonNegativeFinite
from minigpt_pl.training.language_model import MODELS, LanguageModel, LanguageModelConfig, from_checkpoint

__all__ = [
    "MODELS", "AblationLM", "ClassicLM", "LanguageModel", "LanguageModelConfig", "ModernLM", "ModernLMConfig",
    "from_checkpoint",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClassicLMConfig(ClassicConfig, LanguageModelConfig):
    """Of ClassicLM."""


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


class ClassicLM(LanguageModel):
    """GPT-2's decoder at a small size: learned positions, LayerNorm, GELU.

    Args:
        config: The arguments of ClassicLMConfig.
    """

    config_class = ClassicLMConfig

    def __init__(self, **config: Any):
        args = ClassicLMConfig(**config)
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
