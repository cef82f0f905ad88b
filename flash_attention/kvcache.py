"""Attention over a key/value cache: what a model calls for every token that it generates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attention.arguments import INTEGER, Checked, KernelVerdict, left_and_right, require_type, verdicts
from flash_attention.ops import _C, empty_in_layout_of


def _lengths(cache_seqlens: Tensor | int, q: Tensor) -> Tensor:
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    require_type("q", q, (Tensor,), "a tensor")
    require_type("cache_seqlens", cache_seqlens, INTEGER, "an int32 tensor, or one int for all sequences")
    if not -(2**31) <= cache_seqlens < 2**31:
        raise ValueError(f"cache_seqlens {cache_seqlens}: must fit 32 bits")
    return torch.full(q.shape[:1], cache_seqlens, dtype=torch.int32, device=q.device)


def _request(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int = 0,
    out: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> tuple[Any, ...]:
    """The arguments of the ops, in the order of their schema (csrc/bindings/kvcache_request.h)."""
    left, right = left_and_right(window_size)
    return (
        *(q, k_cache, v_cache, k, v, _lengths(cache_seqlens, q), page_table, cache_batch_idx, rotary_cos, rotary_sin),
        *(alibi_slopes, sinks, tree_mask, k_descale, v_descale, out, rotary_interleaved, causal, softmax_scale),
        *(left, right, softcap, num_splits, return_lse, impl),
    )


_OUT = 15
_checked = Checked(torch.ops.flash_attention.with_kvcache_explain)  # whose out may be None


def _with_kvcache(request: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """o and lse: by the short way into the op where every argument is plain, else by torch.ops, which may be traced."""
    if not torch.compiler.is_compiling():
        results = _C.with_kvcache(*request)
        if results is not NotImplemented:
            return results
    q, _, v_cache = _checked(request)[:3]
    out = request[_OUT]
    if out is None:
        four_axes = q.dim() == v_cache.dim() == 4  # else the op refuses, by name
        out = empty_in_layout_of(q, v_cache.shape[-1]) if four_axes else torch.empty_like(q)
    return out, torch.ops.flash_attention.with_kvcache(*request[:_OUT], out, *request[_OUT + 1 :])


def flash_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int = 0,
    out: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of Lq tokens a sequence over a cache of keys and values, which first takes those of the new tokens.

    With k and v given, sequence b has L_b = cache_seqlens[b] tokens in the cache: k and v are stored, rotated, as
    tokens L_b … L_b + Lq − 1, and query i, rotated, stands at position L_b + i. Without, its Lq queries are those of
    the last tokens of the cache, query i at L_b − Lq + i. Then as flash_attention(), in one call. No backward.

    Args:
        q: (B, Hq, Lq, D), float32, float64, float16 or bfloat16; any strides with the last axis contiguous.
        k_cache: (B', Hkv, Lmax, D) and v_cache: (B', Hkv, Lmax, Dv), B' ≥ B, any strides with the last axis contiguous;
            paged: (pages, Hkv, page_size, D) and (pages, Hkv, page_size, Dv). In q's dtype, or float8_e4m3fn with a
            float16 or bfloat16 q (what exceeds ±448 is stored as that). Written if k is given, at the new tokens alone;
            rows of no token are never used.
        k: (B, Hkv, Lq, D) and v: (B, Hkv, Lq, Dv), in q's dtype: the new tokens; both or neither.
        cache_seqlens: (B,) int32 on q's device: tokens in the cache before the call, which does not change it. Or one
            int for all sequences; a CUDA graph needs a tensor for lengths that grow between replays.
        page_table: (B, max_pages) int32: token t of sequence b is row t % page_size of page
            page_table[b, t // page_size]. Entries past the last token are not used.
        cache_batch_idx: (B,) int32: sequence b is row cache_batch_idx[b] of the caches; not with page_table.
            Where k is given, no two sequences may share a page that is written.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), contiguous, q's dtype or float32, a row for every token
            that the cache may hold: rotate the first rotary_dim elements of k and q by their positions. Needs k.
        rotary_interleaved: pairs are (2i, 2i + 1); else (i, i + rotary_dim / 2).
        causal: a query sees keys up to its own position.
        softmax_scale, window_size, softcap, alibi_slopes, sinks: as flash_attention().
        tree_mask: (Lq, Lq) or (B, Lq, Lq) bool, for speculative decoding: whether query i sees new token j, instead of
            causal. Tokens before the last Lq are seen.
        k_descale, v_descale: (Hkv,) or (B, Hkv) float32, of float8 caches: an element times it is the value; 1 if None.
        num_splits: pieces that a sequence's keys are cut into, to be worked on side by side; 0 chooses. No result
            depends on it.
        out: (B, Hq, Lq, Dv) in q's dtype, the last axis contiguous: written and returned.
        return_lse: also return the log-sum-exp of the scores (natural log, scale and sink included).
        impl: "auto", or one of this build's kernels by name; see explain_with_kvcache().

    Returns:
        o (B, Hq, Lq, Dv) in q's dtype, in memory (B, Lq, Hq, Dv) where q is a transposed (B, L, H, D);
        with return_lse also lse (B, Hq, Lq) float32 (float64 for float64).
        A query that sees no key has o = 0 and lse = −inf (with a sink, lse = sink).
        A sequence's results have the same bits whatever else is in the batch.

    Raises:
        ValueError: a shape, a value, or an impl that cannot serve the request (with every reason). Also lengths beyond
            the cache and pages that do not exist: on a GPU only with FLASH_ATTENTION_CHECK=1 in the environment, which
            copies them to the host (as no CUDA graph can capture), else they are cut to the cache. Nothing is written.
        TypeError: a dtype.
        NotImplementedError: an input requires a gradient, and autograd is on.

    Source: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference" (2023); pages after Kwon et al.,
    "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
    """
    o, lse = _with_kvcache(
        _request(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=cache_seqlens,
            page_table=page_table,
            cache_batch_idx=cache_batch_idx,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            tree_mask=tree_mask,
            k_descale=k_descale,
            v_descale=v_descale,
            num_splits=num_splits,
            out=out,
            return_lse=return_lse,
            impl=impl,
        )
    )
    return (o, lse) if return_lse else o


def explain_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None, **options: Any
) -> list[KernelVerdict]:
    """Which kernel flash_attention_with_kvcache() would use for these arguments, and why not the others.

    Returns:
        One KernelVerdict for each kernel of this build, fastest first.

    Raises:
        ValueError, TypeError: as there, for a request that no kernel could serve; lengths and pages are not looked at.
    """
    request = _checked(_request(q, k_cache, v_cache, k, v, **options))
    return verdicts(torch.ops.flash_attention.with_kvcache_explain(*request))


def workspace_bytes_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None, **options: Any
) -> int:
    """Bytes of scratch that flash_attention_with_kvcache() takes for these arguments, besides its results.

    Raises: as explain_with_kvcache().
    """
    return torch.ops.flash_attention.with_kvcache_workspace_bytes(
        *_checked(_request(q, k_cache, v_cache, k, v, **options))
    )
