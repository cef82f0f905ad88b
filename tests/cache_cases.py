"""A call over a key/value cache as data, as cases.py has one without."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .cases import DTYPES

FLOAT8 = torch.float8_e4m3fn
GARBAGE = (-1, 2**31 - 1, -(2**31))  # where a page table is not read


@dataclasses.dataclass(frozen=True)
class CacheCase:
    """One call. Its id names the fields that differ from the defaults; equal cases make equal inputs."""

    dtype: str = "f32"
    float8: bool = False  # the caches
    head_dim: int = 32
    head_dim_v: int | None = None  # as head_dim
    heads_q: int = 4
    heads_kv: int = 2
    seqlen_q: int = 1
    lengths: tuple[int, ...] = (37, 0, 70)  # cache_seqlens
    append: bool = True  # k and v are given
    page_size: int | None = None  # contiguous
    slack: int = 5  # tokens that the cache has room for beyond the longest sequence; with pages at least
    whole_table: bool = False  # a page for each entry, also for those of no token
    batch_idx: bool = False
    layout: str = "bhld"  # memory: "blhd" (length before heads), "gaps" (rows cut out of longer ones)
    rotary: str | None = None  # "interleaved", "halves"
    rotary_dim: int | None = None  # as head_dim
    rotary_dtype: str | None = None  # as dtype
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: str | None = None  # "h" or "bh"
    sinks: bool = False
    tree: str | None = None  # "one" for all sequences, "each"
    descale: str | None = None  # "h" or "bh"
    large: bool = False  # logits to +-1e4
    seed: int = 0

    @property
    def id(self) -> str:
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default or field.name == "dtype":
                name = "" if field.name in ("dtype", "layout") else field.name
                words.append(field.name if value is True else name + str(value).replace(" ", "").strip("()"))
        return "-".join(words)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0) + (self.seqlen_q if self.append else 0)

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """The arguments of flash_attention_with_kvcache() but impl, out, num_splits and return_lse, all new memory.
        Rows of no token are NaN, entries of the page table for no token garbage."""
        return _Maker(self, device).arguments()


class _Maker:
    def __init__(self, case: CacheCase, device: str) -> None:
        self.case, self.device, self.dtype = case, device, DTYPES[case.dtype]
        self.random = torch.Generator().manual_seed(case.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def tensor(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """In the case's layout, the last axis contiguous in each."""
        x = x.to(dtype or self.dtype)
        if self.case.layout == "blhd":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.case.layout == "gaps":
            wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan).to(x.dtype)
            bits(wide)[..., 1:-2] = bits(x)
            x = wide
        x = x.to(self.device)
        return x[..., 1:-2] if self.case.layout == "gaps" else x

    def pages(self) -> tuple[Tensor, int, int]:
        """The table (B, max_pages), pages of the caches, page_size."""
        case, room = self.case, self.case.longest + self.case.slack
        if case.page_size is None:
            count = case.batch + 3 * case.batch_idx
            order = torch.randperm(count, generator=self.random) if case.batch_idx else torch.arange(count)
            return order[: case.batch, None], count, room
        columns = -(-room // case.page_size)
        count = case.batch * columns + 3
        table = torch.randperm(count, generator=self.random)[: case.batch * columns].view(case.batch, columns)
        return table, count, case.page_size

    def arguments(self) -> dict[str, Any]:
        case = self.case
        head_dim_v = case.head_dim_v or case.head_dim
        table, count, page_size = self.pages()
        used = torch.zeros(count, page_size, dtype=torch.bool)
        for b, length in enumerate(case.lengths):
            token = torch.arange(length)
            used[table[b, token // page_size], token % page_size] = True
            if case.page_size is not None and not case.whole_table:
                after = -(-(length + case.seqlen_q * case.append) // page_size)
                table[b, after:] = torch.tensor(GARBAGE)[torch.arange(table.shape[1] - after) % 3]
        growth = 50.0 if case.large else 1.0
        cache_scale = 4.0 if case.descale else growth

        def cache(width: int, scale: float) -> Tensor:
            x = self.normal(count, case.heads_kv, page_size, width) * scale
            return self.tensor(x.masked_fill(~used[:, None, :, None], torch.nan), FLOAT8 if case.float8 else None)

        def new(heads: int, width: int, scale: float = 1.0) -> Tensor:
            return self.tensor(self.normal(case.batch, heads, case.seqlen_q, width) * scale)

        arguments: dict[str, Any] = {
            "q": new(case.heads_q, case.head_dim, growth),
            "k_cache": cache(case.head_dim, cache_scale),
            "v_cache": cache(head_dim_v, cache_scale if case.descale else 1.0),
            "cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32, device=self.device),
            "causal": case.causal,
            "window_size": case.window,
            "softcap": case.softcap,
            "softmax_scale": case.softmax_scale,
        }
        if case.append:
            arguments |= {"k": new(case.heads_kv, case.head_dim, growth), "v": new(case.heads_kv, head_dim_v)}
        if case.page_size is not None:
            arguments["page_table"] = table.to(self.device, torch.int32)
        if case.batch_idx:
            arguments["cache_batch_idx"] = table[:, 0].to(self.device, torch.int32)
        if case.rotary:
            pairs = (case.rotary_dim or case.head_dim) // 2
            angles = torch.arange(max(1, table.shape[1]) * page_size)[:, None] * 1e4 ** -(torch.arange(pairs) / pairs)
            dtype = DTYPES[case.rotary_dtype or case.dtype]
            arguments |= {
                name: angle.to(self.device, dtype)
                for name, angle in (("rotary_cos", angles.double().cos()), ("rotary_sin", angles.double().sin()))
            }
            arguments["rotary_interleaved"] = case.rotary == "interleaved"
        self.per_head(arguments)
        return arguments

    def per_head(self, arguments: dict[str, Any]) -> None:
        case, exact = self.case, torch.promote_types(self.dtype, torch.float32)
        if case.alibi:
            slopes = self.normal(*(case.batch, case.heads_q)[-len(case.alibi) :]).abs() * 0.2
            arguments["alibi_slopes"] = slopes.to(self.device, exact)
        if case.sinks:
            arguments["sinks"] = self.normal(case.heads_q).to(self.device, self.dtype)
        if case.tree:
            masks = self.normal(*[case.batch] * (case.tree == "each"), case.seqlen_q, case.seqlen_q) > 0
            masks.diagonal(dim1=-2, dim2=-1).fill_(True)
            arguments["tree_mask"] = masks.to(self.device)
        if case.descale:
            for name in ("k_descale", "v_descale"):
                scale = 0.1 + 0.3 * self.normal(*(case.batch, case.heads_kv)[-len(case.descale) :]).abs()
                arguments[name] = scale.to(self.device, torch.float32)


def bits(cache: Tensor) -> Tensor:
    """What can be indexed and compared: float8 tensors cannot."""
    return cache.view(torch.uint8) if cache.dtype == FLOAT8 else cache
