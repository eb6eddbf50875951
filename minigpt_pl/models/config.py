"""The sizes of a model: one dataclass for each decoder, where names, ranges and defaults stand once.

`training.lit_modules` adds what training needs, and the command line reads its options from here.
"""

from dataclasses import dataclass
from typing import Any, Literal

from minigpt_pl.runtime.ranges import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, range_errors

RouterGate = Literal["softmax_all", "softmax_selected"]
Stage = Literal["classic", "rmsnorm", "rope", "swiglu", "tied"]


class ConfigError(ValueError):
    """A size that no model can have.

    Args:
        name: The field.
        value: Its value.
        problem: What is wrong with it.
    """

    def __init__(self, name: str, value: object, problem: str):
        super().__init__(f"{name} is {value}: {problem}")
        self.name, self.value, self.problem = name, value, problem


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes that every decoder has.

    Args:
        vocab_size: Tokens in the vocabulary; follows the tokenizer.
        n_layer: Blocks.
        n_head: Attention heads in a block; must divide n_embd.
        n_embd: Width of the residual stream.
        block_size: Tokens of context.
        dropout: Dropout rate on embeddings, attention probabilities and both branches of a block.

    Raises:
        ConfigError: If a value is out of its range.
    """

    vocab_size: int
    n_layer: PositiveInt = 4
    n_head: PositiveInt = 4
    n_embd: PositiveInt = 128
    block_size: PositiveInt = 256
    dropout: Fraction

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.n_embd % self.n_head:
            raise ConfigError("n_head", self.n_head, f"it must divide n_embd, {self.n_embd}")


@dataclass(frozen=True, kw_only=True)
class AblationConfig(GPTConfig):
    """Sizes of a decoder between the classic and the modern one.

    Args:
        stage: The last part that is modern; each stage includes those before it.
    """

    stage: Stage = "classic"


@dataclass(frozen=True, kw_only=True)
class ModernConfig(GPTConfig):
    """Sizes of the modern decoder.

    Args:
        rope_theta: Base of the rotary wavelengths.
        rms_norm_eps: Added to the mean square under the root.
        ffn_mult: Hidden width of a feed-forward network, or of one expert, as a multiple of n_embd.
        n_experts: Experts in each block; 0 for a dense feed-forward network.
        moe_top_k: Experts that each token is sent to.
        moe_gate: How the chosen experts are weighted; see `moe.MoE`. With softmax_selected and moe_top_k 1 the router
            learns from the balance loss alone.
        tie_embeddings: Use the token embedding as the head too.
        zero_init: Initialise the last layer of each branch, and an untied head, with zeros.
        conv_kernel_size: Positions that the short convolution before each branch sums over; 0 for no convolutions.
    """

    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-8
    ffn_mult: PositiveFloat = 2.5
    n_experts: NonNegativeInt = 0
    moe_top_k: PositiveInt = 1
    moe_gate: RouterGate = "softmax_all"
    tie_embeddings: bool = False
    zero_init: bool = True
    conv_kernel_size: NonNegativeInt = 4

    @property
    def ffn_hidden(self) -> int:
        return int(self.ffn_mult * self.n_embd)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd // self.n_head % 2:
            width = self.n_embd // self.n_head
            raise ConfigError("n_head", self.n_head, f"heads must have an even width for rotary positions, not {width}")
        if self.ffn_hidden < 1:
            raise ConfigError("ffn_mult", self.ffn_mult, f"times n_embd, {self.n_embd}, it must be at least 1")
        if self.n_experts and self.moe_top_k > self.n_experts:
            raise ConfigError("moe_top_k", self.moe_top_k, f"it must be at most n_experts, {self.n_experts}")


def check_ranges(config: Any) -> None:
    """Checks the ranges of a dataclass's fields, as the command line does while parsing.

    Raises:
        ConfigError: For the first field that is out of its range.
    """
    for name, value, problem in range_errors(config):
        raise ConfigError(name, value, problem)
