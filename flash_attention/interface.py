"""The functions that a model calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attention.arguments import INTEGER, Checked, KernelVerdict, left_and_right, require_type, verdicts
from flash_attention.ops import _C


def _seed_tensor(seed: int | Tensor | None, q: Tensor) -> Tensor:
    """The 64-bit Philox key as an int64 tensor on q's device."""
    if isinstance(seed, Tensor):
        return seed
    require_type("q", q, (Tensor,), "a tensor")
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    require_type("seed", seed, INTEGER, "an int or an int64 tensor of one element")
    if not -(2**63) <= seed < 2**63:  # never so for a symbolic int, which compilers hold in 64 bits
        seed = (seed + 2**63) % 2**64 - 2**63  # the same 64 bits
    return torch.full((1,), seed, dtype=torch.int64, device=q.device)


def _request(
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
    sinks: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    impl: str = "auto",
) -> tuple[Any, ...]:
    """The arguments of the ops, in the order of their schema (FA_REQUEST in csrc/bindings/request.h)."""
    left, right = left_and_right(window_size)
    seed = _seed_tensor(seed, q) if dropout_p else None
    return (
        *(q, k, v, bias, alibi_slopes, sinks, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k, seed),
        *(max_seqlen_q, max_seqlen_k, softmax_scale, causal, left, right, softcap, dropout_p, deterministic, impl),
    )


_checked = Checked(torch.ops.flash_attention.forward)


def _forward(request: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """o and lse: by the short way into the op where every argument is plain, else by torch.ops, which may be traced."""
    if not torch.compiler.is_compiling():
        results = _C.forward(*request)
        if results is not NotImplemented:
            return results
    return torch.ops.flash_attention.forward(*_checked(request))


def flash_attention(
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
    sinks: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(softmax_scale q kᵀ + bias) v, whose score matrix is never stored. Differentiable.

    With offset = Lk − Lq, query i stands at key position i + offset:

        s = softmax_scale · q_i·k_j;  s = softcap · tanh(s / softcap);  s = s + bias_ij − slope_h · |i + offset − j|

    Args:
        q: (B, Hq, Lq, D), D from 1 to 512; float32, float64, float16 or bfloat16. Any strides with the last axis
            contiguous, so that a (B, L, H, D) tensor is passed as x.transpose(1, 2); nothing is copied.
        k: (B, Hkv, Lk, D) and v: (B, Hkv, Lk, Dv), in q's dtype. Hq is a multiple of Hkv: query head h reads key/value
            head h // (Hq / Hkv).
        causal: key j is visible to query i iff j ≤ i + offset (bottom-right aligned).
        softmax_scale: D^-½ if None.
        window_size: (left, right): key j is visible iff i + offset − left ≤ j ≤ i + offset + right; −1 is unbounded.
        softcap: 0 is none.
        bias: broadcasts to (B, Hq, Lq, Lk); q's dtype or float32 (float64 with float64 inputs). −inf hides a key.
        alibi_slopes: (Hq,) or (B, Hq) float32 (or float64 with float64 inputs).
        sinks: (Hq,) in q's dtype or float32: one more logit per head, whose value is zero.
        seqlens_q, seqlens_k: (B,) int32: lengths of right-padded sequences; offset is then each sequence's own.
            Padded query rows give o = 0, lse = −inf, and take and give no gradient. On a GPU lengths are never read by
            the host, and cut to the tensors; with FLASH_ATTENTION_CHECK=1 in the environment, looked up at each call,
            they are copied to the host and checked as on the CPU (which no CUDA graph can capture).
        dropout_p: probability in [0, 1) of dropping an entry of P, in steps of 2^-16; kept ones are scaled by 1/(1−p).
        seed: int, or int64 tensor of one element, that determines the dropped entries; None draws one from torch's
            generator of the device.
        return_lse: also return the log-sum-exp of the scores (natural log, scale and sink included), differentiable.
        deterministic: the backward gives the same bits on every run (on the CPU it always does).
        impl: "auto", or one of this build's kernels by name; see explain().

    Returns:
        o (B, Hq, Lq, Dv) in q's dtype, in memory (B, Lq, Hq, Dv) where q is a transposed (B, L, H, D);
        with return_lse also lse (B, Hq, Lq) float32 (float64 for float64).
        A query that sees no key has o = 0 and lse = −inf (with a sink, lse = sink).

    Raises:
        ValueError: a shape, a value, or an impl that cannot serve the request (with every reason).
        TypeError: a dtype.

    Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).
    """
    o, lse = _forward(
        _request(
            q,
            k,
            v,
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            bias=bias,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            seqlens_q=seqlens_q,
            seqlens_k=seqlens_k,
            dropout_p=dropout_p,
            seed=seed,
            deterministic=deterministic,
            impl=impl,
        )
    )
    return (o, lse) if return_lse else o


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attention() over sequences of different lengths packed one after the other. Differentiable.

    Args:
        q: (Tq, Hq, D), k: (Tk, Hkv, D), v: (Tk, Hkv, Dv): Tq, Tk are the sums of the lengths.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, from 0, not decreasing: sequence b is rows [cu[b], cu[b + 1]).
            Rows past the last sequence give o = 0, lse = −inf.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        The rest: as flash_attention(). There is no bias.

    Returns:
        o (Tq, Hq, Dv); with return_lse also lse (Hq, Tq) float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: as flash_attention(), and for cumulative lengths that do not start at 0, decrease, end
            beyond the tensor or exceed max_seqlen (on a GPU with FLASH_ATTENTION_CHECK=1, as there).
    """
    o, lse = _forward(
        _request(
            q,
            k,
            v,
            causal=causal,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            dropout_p=dropout_p,
            seed=seed,
            deterministic=deterministic,
            impl=impl,
        )
    )
    return (o, lse) if return_lse else o


def _with_seed(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a call that is asked about and not made: none draws its seed from torch's generator."""
    return options | {"seed": 0} if options.get("seed") is None else options


def explain(q: Tensor, k: Tensor, v: Tensor, *, backward: bool = False, **options: Any) -> list[KernelVerdict]:
    """Which kernel flash_attention(q, k, v, **options) would use, and why not the others.

    Args:
        backward: ask about the backward pass.
        options: the keyword arguments of flash_attention(); for packed sequences also cu_seqlens_q, cu_seqlens_k,
            max_seqlen_q and max_seqlen_k.

    Returns:
        One KernelVerdict for each kernel of this build, fastest first.

    Raises:
        ValueError, TypeError: as flash_attention(), for a request that no kernel could serve.
    """
    request = _checked(_request(q, k, v, **_with_seed(options)))
    return verdicts(torch.ops.flash_attention.explain(*request, backward))


def workspace_bytes(q: Tensor, k: Tensor, v: Tensor, *, backward: bool = False, **options: Any) -> int:
    """Bytes of scratch that flash_attention(q, k, v, **options), or its backward to q, k, v, takes besides its results.

    Args, Raises: as explain().
    """
    return torch.ops.flash_attention.workspace_bytes(*_checked(_request(q, k, v, **_with_seed(options))), backward)
