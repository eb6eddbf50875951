"""One more position of each stream, as plain functions over a model's weights and its cache: what `generation` repeats.

They compute what the modules do. For a single row a module's call and the look-up of its weights take longer than the
product; here both are done once for all positions that a cache holds. Many positions at once are read by the modules.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minigpt_pl.models.attention import CausalSelfAttention, KVCache, RotaryEmbedding, apply_rotary
from minigpt_pl.models.blocks import Block, RMSNorm, SwiGLU, swiglu
from minigpt_pl.models.gpt import GPT
from minigpt_pl.models.moe import MoE, topk_route
from minigpt_pl.models.short_conv import ShortConv

RotaryTables = tuple[Tensor, Tensor] | None
"""Cosines and sines (3, 1, 1, D) of the position for queries, keys and values; None where none are rotated."""


def make_decode_fn(model: GPT, cache: list[KVCache]) -> Callable[[Tensor], Tensor]:
    """A function from the newest token of each stream (S,) to the logits (S, V) of the next; it extends the cache.

    Args:
        model: In eval mode; its weights are read now.
        cache: What `model` fills before the first call, and may fill again.
    """
    blocks = [block_fn(block, layer) for block, layer in zip(model.blocks, cache, strict=True)]
    first: Any = model.blocks[0]
    tokens, positions = model.token_embedding.weight, getattr(model, "position_embedding", None)
    norm, head, turns = layer_fn(model.norm), model.head.weight.t(), rotary_tables(first.attention.rope)

    def step(ids: Tensor) -> Tensor:
        position = cache[0].length
        assert position < model.block_size, "the window is full"
        turn = (turns[0][position], turns[1][position]) if turns is not None else None
        x = tokens.index_select(0, ids)
        if positions is not None:
            x = x + positions.weight[position]
        for block in blocks:
            x = block(x, turn)
        return norm(x) @ head

    return step


def rotary_tables(rope: RotaryEmbedding | None) -> RotaryTables:
    """The turns of every position, (T, 3, 1, 1, D); that of the values leaves them as they are."""
    if rope is None:
        return None
    cos, sin = (table.view(len(table), 1, 1, 1, -1).repeat(1, 3, 1, 1, 1) for table in (rope.cos, rope.sin))
    cos[:, 2], sin[:, 2] = 1, 0
    return cos, sin


def block_fn(block: Any, cache: KVCache) -> Callable[[Tensor, RotaryTables], Tensor]:
    """The block as a function of x (S, C)."""
    assert isinstance(block, Block)
    before = [layer_fn(block.norm_1)] + ([] if block.conv_1 is None else [conv_fn(block.conv_1, cache)])
    attention = attention_fn(block.attention, cache)
    branch = [layer_fn(block.norm_2)] + ([] if block.conv_2 is None else [conv_fn(block.conv_2, cache)])
    branch.append(layer_fn(block.feed_forward))

    def step(x: Tensor, turn: RotaryTables) -> Tensor:
        y = x
        for function in before:
            y = function(y)
        x = attention(y, turn).add_(x)
        y = x
        for function in branch:
            y = function(y)
        return x + y

    return step


def layer_fn(module: Any) -> Callable[[Tensor], Tensor]:
    """A norm or feed-forward net as a function of x (S, C); the module itself unless there is a quicker one."""
    if isinstance(module, RMSNorm) and module.weight.device.type == "cpu":
        C, eps = len(module.weight), module.eps  # x / rms = sqrt(C) x / sqrt(sum of squares + C eps)
        weight, least = module.weight * math.sqrt(C), torch.tensor(math.sqrt(C * eps))
        return lambda x: (x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), least)).mul_(weight)
    if isinstance(module, SwiGLU):
        gate_up, down = module.gate_up.weight.t(), module.down.weight.t()
        return lambda x: swiglu(x @ gate_up) @ down
    return moe_fn(module) if isinstance(module, MoE) else module


def product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear module as a function of x (S, i)."""
    transposed = weight.t()
    return (lambda x: x @ transposed) if bias is None else (lambda x: torch.addmm(bias, x, transposed))


def attention_fn(attention: Any, cache: KVCache) -> Callable[[Tensor, RotaryTables], Tensor]:
    assert isinstance(attention, CausalSelfAttention)
    qkv, heads = attention.qkv, attention.n_head
    C = qkv.in_features
    scale = torch.ones_like(qkv.weight[:, 0])
    scale[:C] = (C // heads) ** -0.5  # of the scores, which is one call less for each position
    to_qkv = product(qkv.weight * scale[:, None], None if qkv.bias is None else qkv.bias * scale)
    to_out = product(attention.out.weight, attention.out.bias)

    def step(x: Tensor, turn: RotaryTables) -> Tensor:
        qkv = to_qkv(x).view(-1, 3, heads, C // heads).transpose(0, 1)  # (3, S, H, D)
        if turn is not None:
            qkv = apply_rotary(qkv, *turn)
        qkv = qkv.reshape(3, -1, 1, C // heads)
        keys, values = cache.extend(qkv[1:])
        y = torch.bmm(torch.bmm(qkv[0], keys.mT).softmax(-1), values)  # the last position sees every key
        return to_out(y.view(-1, C))

    return step


def conv_fn(conv: Any, cache: KVCache) -> Callable[[Tensor], Tensor]:
    assert isinstance(conv, ShortConv)
    oldest_first = conv.weight.flip(0)

    def step(x: Tensor) -> Tensor:
        padded = torch.cat([cache.conv_state[conv], x.unsqueeze(1)], 1)  # (S, K, C)
        cache.conv_state[conv] = padded[:, 1:]
        return x + (padded * oldest_first).sum(1)

    return step


def moe_fn(moe: MoE) -> Callable[[Tensor], Tensor]:
    router, top_k, gate = moe.router.weight.t(), moe.top_k, moe.gate
    gate_up, down = moe.gate_up.mT.unbind(), moe.down.mT.unbind()
    constant = top_k == 1 and gate == "softmax_selected"  # the one chosen is weighed by 1

    def expert(x: Tensor, e: int) -> Tensor:
        return swiglu(x @ gate_up[e]) @ down[e]

    def step(x: Tensor) -> Tensor:
        logits = x @ router
        if len(x) > 1:
            return moe.dispatch(x, *topk_route(logits.float(), top_k, gate))
        if constant:
            (row,) = logits.tolist()
            return expert(x, row.index(max(row)))
        weights, chosen = topk_route(logits.float(), top_k, gate)
        ys = [expert(x, e) for e in chosen[0].tolist()]
        return weights.type_as(x) @ torch.cat(ys) if top_k > 1 else ys[0] * weights.type_as(x)

    return step
