"""When attention over a key/value cache is correct: its results as in checks.py, and what it leaves in the caches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from flash_attention import explain_with_kvcache, flash_attention_with_kvcache
from flash_attention.reference_kvcache import reference_attention_with_kvcache

from .cache_cases import CacheCase, bits
from .cases import DTYPES
from .checks import Expected, Results, assert_all_correct, errors_and_scale, twins


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def serves(impl: str, arguments: dict[str, Any]) -> bool:
    """Whether the kernel takes the call; these three have to take every one, so they are not asked."""
    if impl in ("reference", "fused", "auto"):
        return True
    device = arguments["q"].device.type
    rows = explain_with_kvcache(**arguments, impl=impl)
    return any(row.verdict == "chosen" for row in rows if (row.impl, row.device) == (impl, device))


def run(arguments: dict[str, Any], impl: str, **options: Any) -> Results:
    o, lse = flash_attention_with_kvcache(**arguments, **options, return_lse=True, impl=impl)
    return {"o": o, "lse": lse}


@dataclasses.dataclass
class _ExpectedCaches:
    results: Expected
    k_cache: Tensor
    v_cache: Tensor


@functools.lru_cache(maxsize=8)
def expected(case: CacheCase, device: str = "cpu") -> _ExpectedCaches:
    arguments, dtype = case.inputs(device), DTYPES[case.dtype]
    o, lse, k_cache, v_cache = reference_attention_with_kvcache(**arguments)
    wide = torch.promote_types(dtype, torch.float32)
    standard = {
        "o": reference_attention_with_kvcache(**arguments, dtype=dtype)[0],
        "lse": reference_attention_with_kvcache(**arguments, dtype=wide, round_rotated_q=True)[1],
    }
    reference = {"o": o, "lse": lse}
    errors, scale = errors_and_scale(standard, reference)
    return _ExpectedCaches(Expected(reference, errors, scale, {"o": dtype, "lse": wide}), k_cache, v_cache)


@functools.lru_cache(maxsize=1)
def _other_seeds(case: CacheCase, device: str) -> list[Expected]:
    return [expected.__wrapped__(twin, device).results for twin in twins(case)]


def assert_correct(got: Results, case: CacheCase, device: str = "cpu") -> None:
    others = functools.partial(_other_seeds, case, device)
    assert_all_correct(got, expected(case, device).results, others, case.id, exact=case.dtype == "f64")


def new_places(case: CacheCase, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Pages and rows of all new tokens."""
    page_size = arguments["k_cache"].shape[2]
    table = torch.arange(case.batch)[:, None]
    for name in ("page_table", "cache_batch_idx"):
        if name in arguments:
            table = arguments[name].cpu().view(case.batch, -1)
    pages, rows = [], []
    for b, length in enumerate(case.lengths if case.append else ()):
        token = torch.arange(length, length + case.seqlen_q)
        pages.append(table[b, token // page_size].long())
        rows.append(token % page_size)
    device = arguments["q"].device
    return tuple(torch.cat([torch.zeros(0, dtype=torch.long), *x]).to(device) for x in (pages, rows))


def assert_caches_correct(case: CacheCase, arguments: dict[str, Any], device: str = "cpu") -> None:
    """After the call the caches have the new tokens, each element the rounding of what the oracle stores, and no other
    byte of their memory has changed."""
    before, want = case.inputs(device), expected(case, device)
    pages, rows = new_places(case, arguments)
    for name, reference in (("k_cache", want.k_cache), ("v_cache", want.v_cache)):
        cache = arguments[name]
        got, ideal = (bits(x)[pages, :, rows].view(x.dtype).double() for x in (cache, reference))
        if got.numel() and (case.float8 or (case.rotary and name == "k_cache")):  # a rounding may fall the other way
            eps = 2**-3 if case.float8 else torch.finfo(cache.dtype).eps
            arithmetic = 2**-9 if case.float8 else 4 * min(eps, torch.finfo(torch.float32).eps) * ideal.abs().max()
            assert ((got - ideal).abs() <= eps * ideal.abs() + arithmetic).all(), name
            if cache.dtype.itemsize <= 2:  # which it seldom does, as arithmetic is in float32
                assert (got != ideal).double().mean() <= 0.02, name
        else:
            assert torch.equal(got, ideal), name
        memory, old = (bits(x if x._base is None else x._base) for x in (cache, before[name]))
        view = bits(before[name]).as_strided(cache.shape, cache.stride(), cache.storage_offset())
        view[pages, :, rows] = bits(cache)[pages, :, rows]
        assert torch.equal(memory.contiguous().view(torch.uint8), old.contiguous().view(torch.uint8)), name
