"""The stages from ClassicGPT to ModernGPT: subclasses that each replace one part of what the stage before has built.

The first stage is ClassicGPT. The last is ModernGPT with a tied head and without experts, convolutions and zero
initialisation. Both are bit-exact. What lies beyond (regularisation, context, experts) are options of ModernGPT; see
`configs/studies/ablations.yaml`.
"""

from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from minigpt_pl.models.attention import RotaryEmbedding
from minigpt_pl.models.blocks import RMSNorm, SwiGLU
from minigpt_pl.models.config import ClassicConfig, GPTConfig, ModernConfig, Stage
from minigpt_pl.models.gpt import ClassicGPT, init_weights, residual_std


class AblationGPT(ClassicGPT):
    """ClassicGPT, whose parts a subclass replaces before they are initialised.

    Args:
        config: The sizes; what only the modern decoder has (theta, eps, hidden width) takes ModernConfig's defaults.
        seed: Seed of the initial weights.
    """

    def __init__(self, config: GPTConfig, seed: int):
        sizes = {field.name: getattr(config, field.name) for field in fields(GPTConfig)}
        super().__init__(ClassicConfig(**sizes), seed)
        self.n_embd = config.n_embd
        self.replace_modules(list(self.blocks))
        self.init_again(seed)

    def replace_modules(self, blocks: list[Any]) -> None:
        """Replaces one part; a subclass calls its parent's method first."""

    def init_again(self, seed: int) -> None:
        init_weights(self, seed, dict.fromkeys(self.branch_outputs(), residual_std(len(self.blocks))))


class RMSNormGPT(AblationGPT):
    """RMSNorm in place of LayerNorm; the linear layers lose their biases as the norms do."""

    def replace_modules(self, blocks: list[Any]) -> None:
        super().replace_modules(blocks)
        for block in blocks:
            block.norm_1, block.norm_2 = (RMSNorm(self.n_embd, ModernConfig.rms_norm_eps) for _ in range(2))
        self.norm = RMSNorm(self.n_embd, ModernConfig.rms_norm_eps)
        for linear in [module for module in self.modules() if isinstance(module, nn.Linear)]:
            linear.register_parameter("bias", None)


class RopeGPT(RMSNormGPT):
    """Rotary positions in place of learned ones."""

    def replace_modules(self, blocks: list[Any]) -> None:
        super().replace_modules(blocks)
        del self.position_embedding
        rope = RotaryEmbedding(self.n_embd // blocks[0].attention.n_head, self.block_size, ModernConfig.rope_theta)
        for block in blocks:
            block.attention.rope = rope

    def embed(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids)

    def lookup_params(self) -> int:
        return self.token_embedding.weight.numel()


class SwiGLUGPT(RopeGPT):
    """SwiGLU, with a hidden width of its own, in place of the GELU network."""

    def replace_modules(self, blocks: list[Any]) -> None:
        super().replace_modules(blocks)
        for block in blocks:
            block.feed_forward = SwiGLU(self.n_embd, int(ModernConfig.ffn_mult * self.n_embd))


class TiedGPT(SwiGLUGPT):
    """One table for embedding and head, and one standard deviation for all weights, as in ModernGPT."""

    def replace_modules(self, blocks: list[Any]) -> None:
        super().replace_modules(blocks)
        self.head.weight = self.token_embedding.weight

    def init_again(self, seed: int) -> None:
        init_weights(self, seed, {})

    def lookup_params(self) -> int:
        return 0


STAGES: dict[Stage, type[AblationGPT]] = {
    "classic": AblationGPT,
    "rmsnorm": RMSNormGPT,
    "rope": RopeGPT,
    "swiglu": SwiGLUGPT,
    "tied": TiedGPT,
}
