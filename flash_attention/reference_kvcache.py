"""Attention over a key/value cache in plain PyTorch, one sequence after another: the oracle for
flash_attention_with_kvcache(). Like reference.py it calls no kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attention.reference import reference_attention

_LARGEST = {torch.float8_e4m3fn: 448.0}


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (Su et al., RoFormer, 2021) of x (..., L, D) by cos and sin (L, rotary_dim / 2): of the
    pairs (2i, 2i + 1) if interleaved, else (i, i + rotary_dim / 2), among the first rotary_dim elements."""
    pairs = cos.shape[-1]
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    )
    a, b = x[..., first], x[..., second]
    x = x.clone()
    x[..., first], x[..., second] = a * cos - b * sin, a * sin + b * cos
    return x


def reference_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    round_rotated_q: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The oracle; the caches given to it do not change.

    Args:
        q … v_descale: as flash_attention_with_kvcache().
        dtype: what everything is computed in; what is stored is rounded to the caches' dtype.
        round_rotated_q: to q's dtype, as a model does that rotates q before the call; rotated keys always are, to the
            caches'.
        options: softmax_scale, window_size, softcap and sinks, as there.

    Returns:
        o (B, Hq, Lq, Dv) in `dtype`, lse (B, Hq, Lq) in `dtype`, at least float32; k_cache and v_cache with the new
        tokens.
    """
    (batch, heads_q, seqlen_q, _), head_dim_v = q.shape, v_cache.shape[-1]
    page_size = k_cache.shape[2]
    table = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx
    table = table[:, None] if page_table is None else page_table
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    o = [q.new_zeros(0, heads_q, seqlen_q, head_dim_v, dtype=dtype)]
    lse = [q.new_zeros(0, heads_q, seqlen_q, dtype=torch.promote_types(dtype, torch.float32))]

    for b, length in enumerate(cache_seqlens.tolist()):
        start = length if k is not None else length - seqlen_q
        token = torch.arange(start + seqlen_q, device=q.device)
        place = table[b, token // page_size].long(), token % page_size
        rows_q, scales = q[b].to(dtype), [_of_sequence(t, b) for t in (k_descale, v_descale)]
        if k is not None:
            rows = [k[b].to(dtype), v[b].to(dtype)]
            if rotary_cos is not None:
                cos, sin = (t[start : start + seqlen_q].to(dtype) for t in (rotary_cos, rotary_sin))
                rows_q, rows[0] = (rotated(x, cos, sin, rotary_interleaved) for x in (rows_q, rows[0]))
                rows_q = rows_q.to(q.dtype).to(dtype) if round_rotated_q else rows_q
            for cache, x, scale in zip((k_cache, v_cache), rows, scales, strict=True):
                _store(cache, tuple(i[start:] for i in place), x, scale)
        keys, values = (
            _load(cache, place, scale, dtype) for cache, scale in zip((k_cache, v_cache), scales, strict=True)
        )
        o_b, lse_b = reference_attention(
            *(x[None] for x in (rows_q, keys, values)),
            dtype=dtype,
            causal=causal and tree_mask is None,
            bias=None if tree_mask is None else _tree_bias(tree_mask, b, start, len(token), dtype),
            alibi_slopes=_of_sequence(alibi_slopes, b),
            **options,
        )
        o.append(o_b)
        lse.append(lse_b)
    return torch.cat(o), torch.cat(lse), k_cache, v_cache


def _of_sequence(t: Tensor | None, b: int) -> Tensor | None:
    """Of (H,) or (B, H)."""
    return t[b] if t is not None and t.dim() == 2 else t


def _bits(cache: Tensor) -> Tensor:
    """What can be indexed: float8 tensors cannot."""
    return cache.view(torch.uint8) if cache.dtype in _LARGEST else cache


def _store(cache: Tensor, place: tuple[Tensor, Tensor], x: Tensor, scale: Tensor | None) -> None:
    """x (Hkv, n, D) at n pages and rows."""
    x = x if scale is None else x / scale.to(x.dtype)[:, None, None]
    largest = _LARGEST.get(cache.dtype)
    x = (x if largest is None else x.clamp(-largest, largest)).to(cache.dtype)
    _bits(cache)[place[0], :, place[1]] = _bits(x.transpose(0, 1).contiguous())


def _load(cache: Tensor, place: tuple[Tensor, Tensor], scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(Hkv, n, D) from n pages and rows."""
    x = _bits(cache)[place[0], :, place[1]].view(cache.dtype).transpose(0, 1).to(dtype)
    return x if scale is None else x * scale.to(dtype)[:, None, None]


def _tree_bias(tree_mask: Tensor, b: int, start: int, len_k: int, dtype: torch.dtype) -> Tensor:
    """-inf where a query does not see a key from position `start` on, which may lie before the first."""
    mask = tree_mask[b] if tree_mask.dim() == 3 else tree_mask
    bias = torch.zeros(mask.shape[0], len_k, dtype=dtype, device=mask.device)
    new = slice(max(start, 0), len_k)
    bias[:, new] = bias[:, new].masked_fill(~mask[:, new.start - start :], -torch.inf)
    return bias
