"""Attention in plain PyTorch, obvious rather than fast: the float64 oracle and the unfused baseline in the input dtype.

    s_ij = softmax_scale * q_i.k_j                     offset = seqlen_k - seqlen_q (of the sequence)
    s_ij = softcap * tanh(s_ij / softcap)              if softcap > 0
    s_ij = s_ij + bias_ij - slope_h * |i + offset - j|
    P    = softmax over the visible keys and the sink; o_i = sum_j dropout(P)_ij v_j; lse_i = ln sum_j exp(s_ij)

Nothing here calls the kernels: it shares no code with them, not even the dropout bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def philox4x32_7(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32 with 7 rounds (Salmon et al., SC'11). Four counter words and two key words as int64 tensors that hold
    uint32 values and broadcast against each other; returns the four output words."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(7):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # exact modulo 2^64
        c0, c1, c2, c3 = (
            (product1 >> 32) & _MASK32 ^ c1 ^ key0,
            product1 & _MASK32,
            (product0 >> 32) & _MASK32 ^ c3 ^ key1,
            product0 & _MASK32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def dropout_keep_mask(
    seed: int | Tensor, offset: int, batch: int, heads: int, seqlen_q: int, seqlen_k: int, p: float
) -> Tensor:
    """The entries that dropout keeps: bool (batch, heads, seqlen_q, seqlen_k), a function of nothing but the arguments.

    Args:
        seed: the 64-bit key, an int or an int64 tensor of one element (on whose device the mask is made).
        offset: 32 bits that tell apart calls that share a seed; 0 in every call from Python.
        batch, heads: entry (b, h) is counted as b * heads + h; in a packed batch b is the sequence's index.
        seqlen_q, seqlen_k: rows and columns; in a packed batch both count from the sequence's start.
        p: probability of dropping an entry, in steps of 2^-16.
    """
    return _keep_mask(seed, offset, range(batch * heads), seqlen_q, seqlen_k, p).unflatten(0, (batch, heads))


def _keep_mask(seed: int | Tensor, offset: int, heads: range, seqlen_q: int, seqlen_k: int, p: float) -> Tensor:
    """As above for the (b, h) numbered by `heads`: (len(heads), seqlen_q, seqlen_k). One Philox call serves the eight
    entries {g, g + 8} x {2t, 2t + 1, 2t + 8, 2t + 9} of a 16 x 16 tile, 16 bits each."""
    seed = (
        seed.reshape(()) if isinstance(seed, Tensor) else torch.tensor((seed + 2**63) % 2**64 - 2**63)
    )  # the same bits
    integers = functools.partial(torch.arange, device=seed.device)
    counter = (
        integers(8 * -(-seqlen_q // 16)).view(1, -1, 1),
        integers(4 * -(-seqlen_k // 16)).view(1, 1, -1),
        integers(heads.start, heads.stop).view(-1, 1, 1),
        torch.full((1, 1, 1), offset, device=seed.device),
    )
    words = torch.stack(philox4x32_7(counter, (seed & _MASK32, (seed >> 32) & _MASK32)))  # [4, heads, row, col]
    row, col = integers(seqlen_q).view(-1, 1), integers(seqlen_k).view(1, -1)
    field = 4 * (col // 8 % 2) + 2 * (row // 8 % 2) + col % 2  # [seqlen_q, seqlen_k]
    word = words.permute(1, 0, 2, 3)[:, field // 2, row // 16 * 8 + row % 8, col // 16 * 4 + col % 8 // 2]
    return (word >> 16 * (field % 2)) & 0xFFFF >= int(p * 65536 + 0.5)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, *, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Tensor, Tensor]:
    """The oracle: exact attention that every kernel is compared with, differentiable by plain autograd.

    Args:
        q, k, v: (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), any floating dtype.
        dtype: what everything is computed in.
        options: the keyword arguments of `flash_attention` but impl, deterministic and return_lse.

    Returns:
        o (B, Hq, Lq, Dv) in `dtype` and lse (B, Hq, Lq) in `dtype`, at least float32.
        Gradients flow to q, k, v, bias, alibi_slopes and sinks, each in its own dtype.
    """
    return _attention(q, k, v, dtype, **options)


def reference_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The oracle for packed sequences, one after another.

    Args:
        q, k, v: (Tq, Hq, D), (Tk, Hkv, D), (Tk, Hkv, Dv), any floating dtype.
        cu_seqlens_q, cu_seqlens_k: (B + 1,), sequence b is rows [cu[b], cu[b + 1]).
        alibi_slopes: (Hq,) or (B, Hq).
        dtype, options: as `reference_attention`, without bias and seqlens.

    Returns:
        o (Tq, Hq, Dv) and lse (Hq, Tq), dtypes as `reference_attention`; 0 and -inf in rows of no sequence.
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    o, lse = [], []
    for b in range(len(starts_q) - 1):
        rows_q, rows_k = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        sequence = (x[rows].transpose(0, 1)[None] for x, rows in ((q, rows_q), (k, rows_k), (v, rows_k)))
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        o_b, lse_b = _attention(*sequence, dtype, first_batch=b, alibi_slopes=slopes, **options)
        o.append(o_b[0].transpose(0, 1))
        lse.append(lse_b[0])
    rest = q.shape[0] - starts_q[-1]
    o.append(q.new_zeros(rest, q.shape[1], v.shape[-1], dtype=dtype))
    lse.append(q.new_full((q.shape[1], rest), -torch.inf, dtype=torch.promote_types(dtype, torch.float32)))
    return torch.cat(o), torch.cat(lse, dim=1)


def standard_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """PyTorch's unfused attention in the input dtype: matmul, mask, softmax, matmul, with the Lq x Lk matrix in memory.
    The baseline that the kernels are measured against, in speed, memory and error.

    Args:
        q, k, v: (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv).
        return_lse, options: the keyword arguments of `flash_attention` but impl and deterministic.

    Returns:
        o (B, Hq, Lq, Dv) in q's dtype, and with return_lse also lse (B, Hq, Lq), float32 (float64 for float64 inputs).
    """
    o, lse = _attention(q, k, v, q.dtype, with_lse=return_lse, **options)
    return (o, lse) if return_lse else o


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype,
    *,
    with_lse: bool = True,
    first_batch: int = 0,  # number of the first sequence, which dropout counts
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
) -> tuple[Tensor, Tensor | None]:
    (batch, heads_q, seqlen_q, head_dim), (heads_kv, seqlen_k) = q.shape, k.shape[1:3]
    wide = torch.promote_types(dtype, torch.float32)
    row = torch.arange(seqlen_q, device=q.device).view(-1, 1)
    col = torch.arange(seqlen_k, device=q.device)
    len_q = seqlen_q if seqlens_q is None else seqlens_q.view(-1, 1, 1, 1)
    len_k = seqlen_k if seqlens_k is None else seqlens_k.view(-1, 1, 1, 1)
    center = row + (len_k - len_q)  # the key on the diagonal of each row: [Lq, 1] or [B, 1, Lq, 1]

    # Padding may hold anything, NaN too: it never enters a sum, here or in the backward.
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if seqlens_q is not None:
        q = q.masked_fill(row >= len_q, 0)
    if seqlens_k is not None:
        k, v = (x.masked_fill(col.view(-1, 1) >= len_k, 0) for x in (k, v))
    if heads_kv != heads_q:
        k, v = (x.repeat_interleave(heads_q // heads_kv, dim=1) for x in (k, v))

    # q is scaled before the product, as every unfused attention that must not overflow float16 does.
    scores = q * (head_dim**-0.5 if softmax_scale is None else softmax_scale) @ k.transpose(-1, -2)  # [B, Hq, Lq, Lk]
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(wide).view(-1, heads_q, 1, 1)
        scores = scores - (slopes * (center - col).abs()).to(dtype)

    left, right = window_size
    hidden = []  # masks that broadcast to the scores
    if causal:
        hidden.append(col > center)
    if left >= 0:
        hidden.append(col < center - left)
    if right >= 0:
        hidden.append(col > center + right)
    if seqlens_q is not None:
        hidden.append(row >= len_q)
    if seqlens_k is not None:
        hidden.append(col >= len_k)
    if bias is not None:
        hidden.append(bias == -torch.inf)
    mask = functools.reduce(torch.logical_or, hidden) if hidden else None
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)

    # A row that sees nothing is taken out before the softmax, so that neither it nor its gradient becomes NaN. Causal
    # and window masks leave the diagonal visible: where each row has one, no row is empty, and the pass is spared.
    no_row_is_empty = mask is None or (
        seqlen_q <= seqlen_k and bias is None and seqlens_q is None and seqlens_k is None
    )
    empty = None if no_row_is_empty else mask.all(dim=-1, keepdim=True)
    if sinks is not None:  # one more column, that no value belongs to
        column = sinks.to(dtype).view(-1, 1, 1)
        scores = torch.cat([scores, column.expand(batch, -1, seqlen_q, 1)], dim=-1)
        empty = None if empty is None else empty & (column == -torch.inf)
    if seqlens_q is not None:
        empty = empty | (row >= len_q)
    if empty is not None:
        scores = scores.masked_fill(empty, 0)
    probabilities = torch.softmax(scores, dim=-1)[..., :seqlen_k]
    lse = torch.logsumexp(scores.to(wide), dim=-1) if with_lse else None
    if empty is not None:
        probabilities = probabilities.masked_fill(empty, 0)
        lse = lse.masked_fill(empty[..., 0], -torch.inf) if with_lse else None

    if dropout_p > 0:
        if seed is None:
            seed = torch.randint(2**63 - 1, (1,), device=q.device)
        numbers = range(first_batch * heads_q, (first_batch + batch) * heads_q)
        keep = _keep_mask(seed, 0, numbers, seqlen_q, seqlen_k, dropout_p).unflatten(0, (batch, heads_q))
        probabilities = probabilities * keep.to(q.device) / (1 - dropout_p)
    o = probabilities @ v
    return (o if seqlens_q is None else o.masked_fill(row >= len_q, 0)), lse
