"""One more position of each stream, as plain functions over a model's weights and its cache: what `generation` repeats.

They compute what the modules do. For a single row a module's call and the look-up of its weights take longer than the
product; here both are done once for all positions that a cache holds. Many positions at once are read by the modules.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minigpt_pl.attention import CausalSelfAttention, LayerCache, rotate
from minigpt_pl.convolution import ShortConv
from minigpt_pl.layers import Block, RMSNorm, SwiGLU, inverse_rms, swiglu
from minigpt_pl.models import GPT
from minigpt_pl.moe import MoE, choose_experts

Turn = tuple[Tensor, Tensor] | None
"""Cosines and sines (D,) of the position, or None where positions are not rotated."""


def decoder(model: GPT, cache: list[LayerCache]) -> Callable[[Tensor], Tensor]:
    """A function from the newest token of each stream (S, 1) to the logits (S, V) of the next; it extends the cache.

    Args:
        model: In eval mode; its weights are read now.
        cache: What `model` has filled.
    """
    blocks = [block_step(block, layer) for block, layer in zip(model.blocks, cache, strict=True)]
    first: Any = model.blocks[0]
    norm, head, rope = part(model.norm), model.head.weight, first.attention.rope

    def step(ids: Tensor) -> Tensor:
        position = cache[0].length
        assert position < model.block_size, "the window is full"
        turn = (rope.cos[position], rope.sin[position]) if rope is not None else None
        x = model.embed(ids, position).squeeze(1)
        for block in blocks:
            x = block(x, turn)
        return F.linear(norm(x), head)

    return step


def block_step(block: Any, cache: LayerCache) -> Callable[[Tensor, Turn], Tensor]:
    """The block as a function of x (S, C)."""
    assert isinstance(block, Block)
    before = [part(block.norm_1)] + ([] if block.conv_1 is None else [conv_step(block.conv_1, cache)])
    attention = attention_step(block.attention, cache)
    branch = [part(block.norm_2)] + ([] if block.conv_2 is None else [conv_step(block.conv_2, cache)])
    branch.append(part(block.feed_forward))

    def step(x: Tensor, turn: Turn) -> Tensor:
        y = x
        for function in before:
            y = function(y)
        x = x + attention(y, turn)
        y = x
        for function in branch:
            y = function(y)
        return x + y

    return step


def part(module: Any) -> Callable[[Tensor], Tensor]:
    """A norm or feed-forward net as a function of x (S, C); the module itself unless there is a quicker one."""
    if isinstance(module, RMSNorm) and module.weight.device.type == "cpu":
        weight, eps = module.weight, torch.tensor(module.eps)
        return lambda x: x * inverse_rms(x, eps) * weight
    if isinstance(module, SwiGLU):
        gate_up, down = module.gate_up.weight, module.down.weight
        return lambda x: F.linear(swiglu(F.linear(x, gate_up)), down)
    return moe_step(module) if isinstance(module, MoE) else module


def attention_step(attention: Any, cache: LayerCache) -> Callable[[Tensor, Turn], Tensor]:
    assert isinstance(attention, CausalSelfAttention)
    qkv, out, heads = attention.qkv, attention.out, attention.n_head
    qkv_weight, qkv_bias, out_weight, out_bias = qkv.weight, qkv.bias, out.weight, out.bias

    def step(x: Tensor, turn: Turn) -> Tensor:
        S, C = x.shape
        qkv = F.linear(x, qkv_weight, qkv_bias).view(S, 3, heads, 1, C // heads)  # one position: (S, 3, H, 1, D)
        q, k, v = qkv.unbind(1)
        if turn is not None:
            q, k = rotate(qkv.narrow(1, 0, 2), *turn).unbind(1)
        y = F.scaled_dot_product_attention(q, *cache.extend(k, v))  # the last position sees every key
        return F.linear(y.reshape(S, C), out_weight, out_bias)

    return step


def conv_step(conv: Any, cache: LayerCache) -> Callable[[Tensor], Tensor]:
    assert isinstance(conv, ShortConv)
    oldest_first = conv.weight.flip(0)

    def step(x: Tensor) -> Tensor:
        padded = torch.cat([cache.recent[conv], x.unsqueeze(1)], 1)  # (S, K, C)
        cache.recent[conv] = padded[:, 1:]
        return x + (padded * oldest_first).sum(1)

    return step


def moe_step(moe: MoE) -> Callable[[Tensor], Tensor]:
    router, top_k, gate = moe.router.weight, moe.top_k, moe.gate
    gate_up, down = moe.gate_up.unbind(), moe.down.unbind()

    def step(x: Tensor) -> Tensor:
        weights, chosen = choose_experts(F.linear(x, router).float(), top_k, gate)
        if len(x) > 1:
            return moe.dispatch(x, weights, chosen)
        ys = [F.linear(swiglu(F.linear(x, gate_up[e])), down[e]) for e in chosen[0].tolist()]
        return weights.type_as(x) @ torch.cat(ys) if top_k > 1 else ys[0] * weights.type_as(x)

    return step
