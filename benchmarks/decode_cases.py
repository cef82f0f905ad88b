"""What benchmarks.decode measures: sizes of heads, batch and cache, and the ways in which a cache is kept and used."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from tests.cache_cases import CacheCase

HEAD_DIM = 128  # unless it is what varies
LAYOUTS = ("contiguous", "token_major", "paged", "float8", "append", "mixed")
_HEADS = {"cpu": ((32, 8), (32, 32)), "cuda": ((32, 8), (32, 32), (64, 8))}
# (batch, tokens in the cache). On CUDA 4 MiB to 2 GiB of bfloat16: from less than the L2 cache to all bandwidth.
_SIZES = {
    "cpu": ((1, 512), (1, 4096), (4, 512), (4, 4096)),
    "cuda": (
        *((1, 1024), (1, 4096), (1, 16384), (1, 65536)),
        *((8, 1024), (8, 8192), (32, 4096), (128, 1024)),
    ),
}
_DTYPES = {"cpu": ("f32", "bf16"), "cuda": ("bf16",)}
# The sizes that the cache's layouts, and what else varies, are measured on: few and many sequences.
_VARIED = {"cpu": ((4, 4096),), "cuda": ((8, 8192), (1, 16384), (32, 4096))}
_PAGE_SIZES = (1, 16, 64, 256)
_QUERIES = (2, 4, 8, 16, 32)
_HEAD_DIMS = (64, 256)
_SHORTEST = 16  # of mixed lengths: 1 / _SHORTEST of the longest


def cases(kind: str, *, quick: bool = False) -> list[CacheCase]:
    """Of "cpu" or "cuda"; quick: the first heads, and one size with all that varies."""
    return list(dict.fromkeys(_cases(kind, quick)))  # without repetitions


def _cases(kind: str, quick: bool) -> Iterator[CacheCase]:
    heads, varied = (_HEADS[kind][:1], _VARIED[kind][:1]) if quick else (_HEADS[kind], _VARIED[kind])
    for dtype, of_heads, size in itertools.product(_DTYPES[kind], heads, _SIZES[kind]):
        plain = _plain(dtype, *of_heads, *size)
        yield plain
        yield dataclasses.replace(plain, layout="blhd")
        if of_heads == heads[0] and size in varied:
            yield from _variants(plain)


def _plain(dtype: str, heads_q: int, heads_kv: int, batch: int, seqlen_k: int) -> CacheCase:
    """One token of each sequence, in a contiguous cache that it is already in."""
    return CacheCase(
        dtype,
        head_dim=HEAD_DIM,
        heads_q=heads_q,
        heads_kv=heads_kv,
        lengths=(seqlen_k,) * batch,
        append=False,
        slack=0,
    )


def _variants(plain: CacheCase) -> Iterator[CacheCase]:
    longest, batch = plain.longest, plain.batch
    changes = [
        *({"page_size": size} for size in _PAGE_SIZES),
        {"append": True, "rotary": "halves", "lengths": (longest - 1,) * batch},
        *({"seqlen_q": queries} for queries in _QUERIES),
        *({"head_dim": head_dim} for head_dim in _HEAD_DIMS),
    ]
    if batch > 1:
        changes.append({"lengths": _mixed(longest, batch)})
    if plain.dtype != "f32":
        changes += [{"float8": True}, {"dtype": "f32"}]
    for change in changes:
        yield dataclasses.replace(plain, **change)


def _mixed(longest: int, batch: int) -> tuple[int, ...]:
    """Evenly from a sixteenth to all of it, long and short ones mixed."""
    lengths = torch.linspace(longest // _SHORTEST, longest, batch).round().int()
    return tuple(lengths[torch.randperm(batch, generator=torch.Generator().manual_seed(0))].tolist())
