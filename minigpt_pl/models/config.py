"""The sizes of a model: one dataclass for each decoder, where names, ranges and defaults stand once.

`training.lit_modules` adds what training needs, and the command line reads its options from here.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from minigpt_pl.runtime.errors import UserError
from minigpt_pl.runtime.ranges import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, check_ranges

RouterGate = Literal["softmax_all", "softmax_selected"]
GELU = Literal["tanh", "exact"]
WeightInit = Literal["gpt2", "torch"]
Stage = Literal["classic", "rmsnorm", "rope", "swiglu", "tied"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes that every decoder has.

    Args:
        vocab_size: Tokens in the vocabulary; follows the tokenizer.
        n_layer: Blocks.
        n_head: Attention heads in a block; must divide n_embd.
        n_embd: Width of the residual stream.
        block_size: Tokens of context.
        dropout: Dropout on embeddings, attention probabilities and both branches.

    Raises:
        UserError: If a value is out of its range.
    """

    vocab_size: int
    n_layer: PositiveInt = 4
    n_head: PositiveInt = 4
    n_embd: PositiveInt = 128
    block_size: PositiveInt = 256
    dropout: Fraction

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        self._require("n_head", self.n_embd % self.n_head == 0, f"it must divide n_embd, {self.n_embd}")

    def _require(self, name: str, good: bool, problem: str) -> None:
        if not good:
            raise UserError(problem, option=f"model.{name}", value=getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ClassicConfig(GPTConfig):
    """Sizes of the classic decoder, and what decoders of its time do differently.

    Args:
        gelu: tanh for GPT-2's approximation, exact for the error function.
        weight_init: gpt2 for small normal weights, torch for the defaults of torch's own modules.
        attention_output_dropout: Apply dropout to the output of attention too.
    """

    gelu: GELU = "tanh"
    weight_init: WeightInit = "gpt2"
    attention_output_dropout: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in ("gelu", get_args(GELU)), ("weight_init", get_args(WeightInit)):
            self._require(name, getattr(self, name) in choices, f"it must be {' or '.join(choices)}")


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
        conv_kernel_size: Positions that the convolution before a branch sums, or 0.
        qk_norm: Divide queries and keys by their root mean square.
        attention_every: One block in so many has attention, the last one always.
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
    qk_norm: bool = True
    attention_every: PositiveInt = 4

    @property
    def ffn_hidden(self) -> int:
        return int(self.ffn_mult * self.n_embd)

    def __post_init__(self) -> None:
        super().__post_init__()
        width = self.n_embd // self.n_head
        self._require("n_head", width % 2 == 0, f"heads must have an even width for rotary positions, not {width}")
        self._require("ffn_mult", self.ffn_hidden >= 1, f"times n_embd, {self.n_embd}, it must be at least 1")
        fits = self.n_experts == 0 or self.moe_top_k <= self.n_experts
        self._require("moe_top_k", fits, f"it must be at most n_experts, {self.n_experts}")
