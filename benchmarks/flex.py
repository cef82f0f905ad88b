"""The peer "flex": PyTorch's FlexAttention, compiled, with our options as its score_mod and block mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .problem import renamed


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention as it is meant to be called, one kernel for each shape and each mask_mod or score_mod."""
    torch._dynamo.config.recompile_limit = 64  # of them; beyond it fullgraph raises instead of falling back
    torch._functorch.config.donated_buffer = False  # a graph is differentiated again and again
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def attention(q: Tensor, k: Tensor, v: Tensor, **prepared: Any) -> Tensor:
    return _compiled()(q, k, v, **prepared)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The options as FlexAttention's score_mod and block mask."""
    renamed(options, {}, "FlexAttention")  # all that it has are named above
    if q.device.type == "cpu" and any(x is not None and x.requires_grad for x in (q, k, v, bias, alibi_slopes)):
        raise NotImplementedError("FlexAttention has no backward on a CPU")
    (batch, heads, seqlen_q, _), (heads_kv, seqlen_k) = q.shape, k.shape[1:3]
    offset = seqlen_k - seqlen_q
    prepared: dict[str, Any] = {"scale": softmax_scale, "enable_gqa": heads != heads_kv}
    if causal or window_size != (-1, -1):
        prepared["block_mask"] = _block_mask(seqlen_q, seqlen_k, causal, *window_size, q.device)
    if bias is not None:
        bias = bias.expand(batch, heads, seqlen_q, seqlen_k)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(batch, heads)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[b, h, i, j]
        if alibi_slopes is not None:
            distance = i + offset - j
            score = score - alibi_slopes[b, h] * (distance if causal else distance.abs())
        return score

    if softcap or bias is not None or alibi_slopes is not None:
        prepared["score_mod"] = score_mod
    return prepared


@functools.lru_cache(maxsize=8)
def _block_mask(seqlen_q: int, seqlen_k: int, causal: bool, left: int, right: int, device: torch.device) -> BlockMask:
    offset = seqlen_k - seqlen_q
    right = 0 if causal else right
    has_left, left_keys = left >= 0, torch.tensor(left, device=device)  # a tensor: different widths share a kernel

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = i + offset - j
        if not has_left:
            return distance >= -right
        if right < 0:
            return distance <= left_keys
        return (distance >= -right) & (distance <= left_keys)

    return create_block_mask(mask_mod, None, None, seqlen_q, seqlen_k, device=device)
