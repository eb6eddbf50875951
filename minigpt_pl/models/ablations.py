"""The steps from ClassicGPT to ModernGPT: subclasses that replace one part each of what the step below has built.

The first is ClassicGPT; the last is ModernGPT with a tied head, without experts, convolutions and branches that begin
at 0; both to the bit. What comes above, in regularisation, context and experts, are settings of ModernGPT:
`configs/studies/ablations.yaml`.
"""

from typing import Any, Literal

from torch import Tensor, nn

from minigpt_pl.models.attention import RotaryEmbedding
from minigpt_pl.models.blocks import RMSNorm, SwiGLU
from minigpt_pl.models.gpt import ClassicGPT, gpt2_std, init_weights


class AblationGPT(ClassicGPT):
    """ClassicGPT, whose parts a subclass may replace before they are initialised.

    Args:
        vocab_size: As of ModernGPT, like all others.
        block_size: Positions T.
        n_layer: Blocks.
        n_head: Heads.
        n_embd: Width C.
        dropout: As of both.
        rope_theta: Used from RopeGPT on.
        rms_norm_eps: Used from RMSNormGPT on.
        ffn_mult: Used from SwiGLUGPT on.
        seed: Of the initial weights.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        n_layer: int,
        n_head: int,
        n_embd: int,
        dropout: float,
        rope_theta: float,
        rms_norm_eps: float,
        ffn_mult: float,
        seed: int,
    ):
        super().__init__(vocab_size, block_size, n_layer, n_head, n_embd, dropout, seed)
        self.n_embd, self.rope_theta, self.rms_norm_eps, self.ffn_mult = n_embd, rope_theta, rms_norm_eps, ffn_mult
        self.replace_parts(list(self.blocks))
        init_weights(self, self.std, seed)

    def replace_parts(self, blocks: list[Any]) -> None:
        """Puts a new part in the place of an old one; a subclass calls its parent's first."""

    def std(self, name: str) -> float:
        return gpt2_std(len(self.blocks))(name)


class RMSNormGPT(AblationGPT):
    """RMSNorm for LayerNorm; the linear layers lose their biases as the norms do."""

    def replace_parts(self, blocks: list[Any]) -> None:
        super().replace_parts(blocks)
        for block in blocks:
            block.norm_1, block.norm_2 = (RMSNorm(self.n_embd, self.rms_norm_eps) for _ in range(2))
        self.norm = RMSNorm(self.n_embd, self.rms_norm_eps)
        for linear in [module for module in self.modules() if isinstance(module, nn.Linear)]:
            linear.bias = None  # type: ignore[assignment]


class RopeGPT(RMSNormGPT):
    """Rotary positions for learned ones."""

    def replace_parts(self, blocks: list[Any]) -> None:
        super().replace_parts(blocks)
        del self.position_embedding
        rope = RotaryEmbedding(self.n_embd // blocks[0].attention.n_head, self.block_size, self.rope_theta)
        for block in blocks:
            block.attention.rope = rope

    def embed(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids)

    def lookup_params(self) -> int:
        return self.token_embedding.weight.numel()


class SwiGLUGPT(RopeGPT):
    """SwiGLU, of its own width, for the GELU net."""

    def replace_parts(self, blocks: list[Any]) -> None:
        super().replace_parts(blocks)
        for block in blocks:
            block.feed_forward = SwiGLU(self.n_embd, int(self.ffn_mult * self.n_embd))


class TiedGPT(SwiGLUGPT):
    """One table for embedding and head, and one standard deviation for all weights: ModernGPT."""

    def replace_parts(self, blocks: list[Any]) -> None:
        super().replace_parts(blocks)
        self.head.weight = self.token_embedding.weight

    def std(self, name: str) -> float:
        return 0.02

    def lookup_params(self) -> int:
        return 0


Stage = Literal["classic", "rmsnorm", "rope", "swiglu", "tied"]
STAGES: dict[Stage, type[AblationGPT]] = {
    "classic": AblationGPT,
    "rmsnorm": RMSNormGPT,
    "rope": RopeGPT,
    "swiglu": SwiGLUGPT,
    "tied": TiedGPT,
}
