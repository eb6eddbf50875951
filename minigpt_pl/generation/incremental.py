"""The forward pass of one more position, as plain functions over a model's weights and its cache.

`generate` repeats it for every token. For a single row, calling a module and looking up its weights takes longer than
the product itself; here both are done once for all positions that a cache holds. This makes generation about three
times as fast. Many positions at once (a prompt, a refilled window) are read by the modules themselves.

Each function computes what one module computes. All are held equal by tests/generation/test_generate.py, which compares
cached with uncached text for every kind of model, and tests/models/test_blocks.py, which compares a rotated position.

| here                                          | module                                                  |
|-----------------------------------------------|---------------------------------------------------------|
| `make_decode_fn`                              | `gpt.GPT.forward`                                       |
| `block_fn`                                    | `blocks.Block.forward`                                  |
| `attention_fn`, `linear_fn`, `rotary_tables`  | `attention.CausalSelfAttention`, `nn.Linear`, `split_qkv_heads` |
| `layer_fn`                                    | `blocks.RMSNorm`, `blocks.SwiGLU`, else the module itself |
| `conv_fn`                                     | `short_conv.ShortConv`                                  |
| `moe_fn`                                      | `moe.MoE`                                               |

Shapes: S streams, C = n_embd, H heads, D = C // H, V vocabulary, T positions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minigpt_pl.models.attention import CausalSelfAttention, KVCache, RotaryEmbedding, apply_rotary
from minigpt_pl.models.blocks import MLP, Block, RMSNorm, SwiGLU, swiglu
from minigpt_pl.models.cpu_ops import inverse_rms
from minigpt_pl.models.dropout import Dropout
from minigpt_pl.models.gpt import GPT
from minigpt_pl.models.moe import MoE, topk_route
from minigpt_pl.models.short_conv import ShortConv
from minigpt_pl.runtime.user_classes import is_own

RotaryTables = tuple[Tensor, Tensor] | None
"""Cosines and sines (3, 1, 1, D) of one position for queries, keys and values; None without rotary positions."""

KNOWN_PARTS = {
    nn.Embedding, nn.LayerNorm, nn.Linear, nn.ModuleList, Block, CausalSelfAttention, Dropout, MLP, MoE, RMSNorm,
    RotaryEmbedding, ShortConv, SwiGLU,
}  # fmt: skip


def supports(model: GPT) -> bool:
    """Whether the functions here compute what a model computes: this package defines it and its parts.

    A user's part, or a hook, may do anything. Biases of SwiGLU and of the head are not read here, nor are the rotary
    positions of any but the first block.
    """
    modules = list(model.modules())
    if not is_own(type(model)) or not {type(module) for module in modules[1:]} <= KNOWN_PARTS:
        return False
    blocks: Any = model.blocks
    inner = [layer for module in modules if isinstance(module, SwiGLU | MoE) for layer in module.children()]
    biased = any(layer.bias is not None for layer in (model.head, *inner))
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    ropes = {block.attention.rope for block in blocks if block.attention is not None}
    return not biased and not hooked and len(ropes) == 1


def make_decode_fn(model: GPT, cache: list[KVCache]) -> Callable[[Tensor], Tensor]:
    """A function from the newest token of each stream (S,) to the logits (S, V) of the next; it extends the cache.

    Args:
        model: In eval mode; its weights are read now.
        cache: Filled by `model` before the first call, and whenever the window has been shortened.
    """
    blocks = [block_fn(block, layer) for block, layer in zip(model.blocks, cache, strict=True)]
    last: Any = model.blocks[-1]  # every model's last block has attention
    tokens, positions = model.token_embedding.weight, getattr(model, "position_embedding", None)
    norm, head, tables = layer_fn(model.norm), model.head.weight.t(), rotary_tables(last.attention.rope)

    def decode(ids: Tensor) -> Tensor:
        position = cache[-1].length
        assert position < model.block_size, "the window is full"
        rotary = (tables[0][position], tables[1][position]) if tables is not None else None
        x = tokens.index_select(0, ids)  # (S, C)
        if positions is not None:
            x = x + positions.weight[position]
        for block in blocks:
            x = block(x, rotary)
        return norm(x) @ head

    return decode


def rotary_tables(rope: RotaryEmbedding | None) -> RotaryTables:
    """Cosines and sines of every position, (T, 3, 1, 1, D); those of the values leave them unchanged."""
    if rope is None:
        return None
    cos, sin = (table.view(len(table), 1, 1, 1, -1).repeat(1, 3, 1, 1, 1) for table in (rope.cos, rope.sin))
    cos[:, 2], sin[:, 2] = 1, 0
    return cos, sin


def block_fn(block: Any, cache: KVCache) -> Callable[[Tensor, RotaryTables], Tensor]:
    """The block as a function of x (S, C)."""
    assert isinstance(block, Block)
    branch = [layer_fn(block.norm_2)] + ([] if block.conv_2 is None else [conv_fn(block.conv_2, cache)])
    branch.append(layer_fn(block.feed_forward))
    if block.attention is None:
        attention = None
    else:
        attention = attention_fn(block.attention, cache)
        attention_input = [layer_fn(block.norm_1)] + ([] if block.conv_1 is None else [conv_fn(block.conv_1, cache)])

    def decode(x: Tensor, rotary: RotaryTables) -> Tensor:
        y = x
        if attention is not None:
            for function in attention_input:
                y = function(y)
            x = attention(y, rotary).add_(x)
            y = x
        for function in branch:
            y = function(y)
        return x + y

    return decode


def layer_fn(module: Any) -> Callable[[Tensor], Tensor]:
    """A norm or feed-forward network as a function of x (S, C); the module itself where it is fast enough."""
    if isinstance(module, RMSNorm) and module.weight.device.type == "cpu":
        C, eps = len(module.weight), module.eps  # x / rms = sqrt(C) x / sqrt(sum of squares + C eps)
        weight, floor = module.weight * math.sqrt(C), torch.tensor(math.sqrt(C * eps))
        return lambda x: (x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)).mul_(weight)
    if isinstance(module, SwiGLU):
        gate_up, down = module.gate_up.weight.t(), module.down.weight.t()
        return lambda x: swiglu(x @ gate_up) @ down
    return moe_fn(module) if isinstance(module, MoE) else module


def linear_fn(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear module as a function of x (S, i)."""
    transposed = weight.t()
    return (lambda x: x @ transposed) if bias is None else (lambda x: torch.addmm(bias, x, transposed))


def attention_fn(attention: Any, cache: KVCache) -> Callable[[Tensor, RotaryTables], Tensor]:
    assert isinstance(attention, CausalSelfAttention)
    qkv, heads, qk_norm_eps, qk_gain = attention.qkv, attention.n_head, attention.qk_norm_eps, attention.qk_gain
    C = qkv.in_features
    # The scale of the scores is multiplied into the queries' weights: one call less for each position.
    scale = torch.ones_like(qkv.weight[:, 0])
    if qk_norm_eps is None:
        scale[:C] = (C // heads) ** -0.5
    factors = scale.new_ones(2, 1, 1, 1)  # of the unit queries and keys
    if qk_gain is not None:
        factors *= qk_gain
        factors[0] *= (C // heads) ** -0.5
    project_qkv = linear_fn(qkv.weight * scale[:, None], None if qkv.bias is None else qkv.bias * scale)
    project_out = linear_fn(attention.out.weight, attention.out.bias)

    def decode(x: Tensor, rotary: RotaryTables) -> Tensor:
        qkv = project_qkv(x).view(-1, 3, heads, C // heads).transpose(0, 1)  # (3, S, H, D)
        if rotary is not None:
            qkv = apply_rotary(qkv, *rotary)
        if qk_norm_eps is not None:
            qk = qkv[:2]
            qkv = torch.cat([qk * (inverse_rms(qk, qk_norm_eps) * factors), qkv[2:]])
        qkv = qkv.reshape(3, -1, 1, C // heads)  # (3, S * H, 1, D)
        keys, values = cache.extend(qkv[1:])  # (S * H, length, D) each
        y = torch.bmm(torch.bmm(qkv[0], keys.mT).softmax(-1), values)  # no mask: the last position sees every key
        return project_out(y.view(-1, C))

    return decode


def conv_fn(conv: Any, cache: KVCache) -> Callable[[Tensor], Tensor]:
    assert isinstance(conv, ShortConv)
    oldest_first = conv.weight.flip(0)

    def decode(x: Tensor) -> Tensor:
        window = torch.cat([cache.conv_state[conv], x.unsqueeze(1)], 1)  # (S, K, C)
        cache.conv_state[conv] = window[:, 1:]
        return x + (window * oldest_first).sum(1)

    return decode


def moe_fn(moe: MoE) -> Callable[[Tensor], Tensor]:
    router, top_k, gate = moe.router.weight.t(), moe.top_k, moe.gate
    gate_up, down = moe.gate_up.mT.unbind(), moe.down.mT.unbind()
    weight_is_one = top_k == 1 and gate == "softmax_selected"

    def expert(x: Tensor, e: int) -> Tensor:
        return swiglu(x @ gate_up[e]) @ down[e]

    def decode(x: Tensor) -> Tensor:
        logits = x @ router  # (S, E)
        if len(x) > 1:
            return moe.dispatch(x, *topk_route(logits.float(), top_k, gate))
        if weight_is_one:
            (row,) = logits.tolist()
            return expert(x, row.index(max(row)))
        weights, chosen = topk_route(logits.float(), top_k, gate)
        outputs = [expert(x, e) for e in chosen[0].tolist()]
        return weights.type_as(x) @ torch.cat(outputs) if top_k > 1 else outputs[0] * weights.type_as(x)

    return decode
