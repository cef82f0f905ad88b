"""Attention over a key/value cache as a problem: a case of the test table's kind, its tensors, the call, its bytes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from tests.cache_cases import FLOAT8, CacheCase
from tests.cases import DTYPES

from .implementations import OURS, find

_ROTARY_BASE = 1e4


@dataclasses.dataclass(frozen=True)
class CacheProblem:
    """One case without slack, batch_idx, tree or any option of the scores; one device."""

    case: CacheCase
    device: str = "cpu"

    @property
    def id(self) -> str:
        case = self.case
        return f"decode {case.heads_q}:{case.heads_kv} B{case.batch} L{case.seqlen_q}x{case.longest} {self.layout}"

    @property
    def layout(self) -> str:
        """What distinguishes the cache, or its use, from one that is contiguous, whole and given."""
        case = self.case
        words = {
            "token_major": case.layout == "blhd",
            "paged": case.page_size is not None,
            "float8": case.float8,
            "append": case.append,
            "mixed": len(set(case.lengths)) > 1,
        }
        return "+".join(word for word, holds in words.items() if holds) or "contiguous"

    @property
    def has_peers(self) -> bool:
        """Whether PyTorch's SDPA, which takes two whole tensors, computes it."""
        return self.layout in ("contiguous", "token_major")

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that the call has to read: of the tokens that there are, the new ones included."""
        case = self.case
        tokens = sum(case.lengths) + case.batch * case.seqlen_q * case.append
        return 2 * tokens * case.heads_kv * case.head_dim * (FLOAT8 if case.float8 else DTYPES[case.dtype]).itemsize

    def columns(self) -> dict[str, Any]:
        """The problem, as CSV columns; page_size 0 is a cache without pages."""
        case = self.case
        return {
            "heads_q": case.heads_q,
            "heads_kv": case.heads_kv,
            "batch": case.batch,
            "seqlen_k": case.longest,
            "layout": self.layout,
            "page_size": case.page_size or 0,
            "dtype": str(DTYPES[case.dtype]).removeprefix("torch."),
            "head_dim": case.head_dim,
            "seqlen_q": case.seqlen_q,
        }

    def inputs(self) -> dict[str, Any]:
        """The arguments of flash_attention_with_kvcache() but impl, drawn on the device; the caches are full."""
        case, capacity = self.case, self.case.longest
        random = torch.Generator(self.device).manual_seed(case.seed)

        def rows(count: int, heads: int, length: int) -> Tensor:
            """(count, heads, length, D), in the case's layout."""
            is_token_major = case.layout == "blhd"
            shape = (count, length, heads, case.head_dim) if is_token_major else (count, heads, length, case.head_dim)
            x = torch.randn(shape, generator=random, device=self.device, dtype=DTYPES[case.dtype])
            return x.transpose(1, 2) if is_token_major else x

        def cache() -> Tensor:
            x = rows(case.batch * columns, case.heads_kv, page_size)
            return x.to(FLOAT8) if case.float8 else x

        page_size = case.page_size or capacity
        columns = -(-capacity // page_size)
        arguments = {
            "q": rows(case.batch, case.heads_q, case.seqlen_q),
            "k_cache": cache(),
            "v_cache": cache(),
            "cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32, device=self.device),
        }
        if case.page_size:
            pages = torch.randperm(case.batch * columns, generator=torch.Generator().manual_seed(case.seed))
            arguments["page_table"] = pages.view(case.batch, columns).to(self.device, torch.int32)
        if case.append:
            arguments |= {name: rows(case.batch, case.heads_kv, case.seqlen_q) for name in "kv"}
        if case.rotary:
            pairs = case.head_dim // 2
            angles = torch.arange(capacity)[:, None] * _ROTARY_BASE ** -(torch.arange(pairs) / pairs)
            arguments |= {"rotary_cos": angles.cos().to(self.device), "rotary_sin": angles.sin().to(self.device)}
            arguments["rotary_interleaved"] = case.rotary == "interleaved"
        return arguments


class CacheCall:
    """call() runs one implementation once and returns o. Appending leaves cache_seqlens as they are, so that every call
    stores the same tokens in the same places."""

    can_be_captured = True

    def __init__(self, impl: str, problem: CacheProblem, inputs: dict[str, Any]) -> None:
        self.context = find(impl).context
        self.on_cuda = inputs["q"].is_cuda
        if impl in OURS:
            from flash_attention import flash_attention_with_kvcache

            self._attention = functools.partial(flash_attention_with_kvcache, **inputs, impl=impl)
            return
        if not problem.has_peers:
            raise NotImplementedError(f"not measured on a cache that is {problem.layout}")
        qkv = [inputs[name] for name in ("q", "k_cache", "v_cache")]
        prepared = find(impl).prepare(*qkv, causal=problem.case.seqlen_q > 1)
        self._attention = functools.partial(find(impl).attention, *qkv, **prepared)

    def __call__(self) -> Tensor:
        """To be called within self.context()."""
        return self._attention()
