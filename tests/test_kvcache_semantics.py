"""What a model relies on when it generates: prefill and decoding are the forward pass, a tree is its paths, rows
without keys are zero, out is written where it lies, float8 costs what it rounds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flash_attention import flash_attention, flash_attention_with_kvcache, workspace_bytes_with_kvcache
from flash_attention.reference_kvcache import rotated

from .cache_cases import FLOAT8, CacheCase
from .cache_checks import run, same_bits, serves
from .conftest import CACHE_IMPLS, each_cache_kernel, near

int32 = torch.int32


def caches(
    batch: int, heads: int, tokens: int, width: int, page_size: int | None, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Empty ones: the page table, if any, k_cache and v_cache."""
    if page_size is None:
        shape, table = (batch, heads, tokens, width), {}
    else:
        columns = -(-tokens // page_size)
        shape = (batch * columns + 2, heads, page_size, width)
        order = torch.randperm(batch * columns + 2)[: batch * columns]
        table = {"page_table": order.view(batch, columns).to(device, int32)}
    return table, *(torch.full(shape, torch.nan, device=device).to(dtype) for _ in range(2))


CHUNKS = {"token by token": (20, *[1] * 13), "chunks": (7, 16, 1, 9), "whole": (33,)}


@each_cache_kernel()
@pytest.mark.parametrize("page_size", [None, 1, 16])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefill_and_decoding_are_the_forward_pass(
    dtype: torch.dtype, chunks: str, page_size: int | None, device: str, impl: str
) -> None:
    (q, k, v), (cos, sin) = (torch.randn(2, heads, 33, 64, dtype=dtype, device=device) for heads in (4, 2, 2)), rotary()
    cos, sin = cos.to(device), sin.to(device)
    table, k_cache, v_cache = caches(2, 2, 48, 64, page_size, dtype, device)
    lengths, o = torch.zeros(2, dtype=int32, device=device), []
    for part in zip(*(x.split(CHUNKS[chunks], dim=2) for x in (q, k, v)), strict=True):
        options = {**table, "cache_seqlens": lengths, "rotary_cos": cos, "rotary_sin": sin}
        arguments = dict(zip(("q", "k", "v"), part, strict=True), k_cache=k_cache, v_cache=v_cache)
        if not serves(impl, {**arguments, **options}):
            pytest.skip(f"{impl} does not take this")
        o.append(flash_attention_with_kvcache(**arguments, **options, impl=impl))
        lengths += part[0].shape[2]
    q, k = (rotated(x.double(), cos[:33].double(), sin[:33].double(), True).to(dtype) for x in (q, k))
    torch.testing.assert_close(torch.cat(o, dim=2), flash_attention(q, k, v, causal=True), **near(dtype))


def rotary(positions: int = 64, pairs: int = 16) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] * 1e4 ** -(torch.arange(pairs) / pairs)
    return angles.cos(), angles.sin()


PARENTS = (-1, 0, 0, 1, 1, 2, 3, 3, 5)  # of each draft token; -1: the last one accepted


def path_to(node: int) -> list[int]:
    return [] if node < 0 else [*path_to(PARENTS[node]), node]


@each_cache_kernel()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tree_of_draft_tokens_is_each_of_its_paths(dtype: torch.dtype, device: str, impl: str) -> None:
    count, past = len(PARENTS), 50
    tree = torch.zeros(count, count, dtype=torch.bool)
    for node in range(count):
        tree[node, path_to(node)] = True
    q, k, v = (torch.randn(1, heads, count, 64, dtype=dtype, device=device) for heads in (4, 2, 2))
    k_cache, v_cache = (torch.randn(1, 2, 64, 64, dtype=dtype, device=device) for _ in range(2))
    options = {"cache_seqlens": torch.tensor([past], dtype=int32, device=device)}
    arguments = {"q": q, "k": k, "v": v, "tree_mask": tree.to(device), **options}
    if not serves(impl, {**arguments, "k_cache": k_cache, "v_cache": v_cache}):
        pytest.skip(f"{impl} does not take this")
    together = flash_attention_with_kvcache(k_cache=k_cache.clone(), v_cache=v_cache.clone(), **arguments, impl=impl)
    for node in range(count):
        path = [x[:, :, path_to(node)] for x in (q, k, v)]
        alone = flash_attention_with_kvcache(path[0], k_cache.clone(), v_cache.clone(), *path[1:], **options, impl=impl)
        tolerance = {"rtol": 0, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(together[:, :, node], alone[:, :, -1], **tolerance)


OUT = (
    CacheCase("bf16", head_dim=64, heads_q=8, lengths=(70, 3, 0, 26)),
    CacheCase("f16", head_dim=128, heads_q=8, seqlen_q=5, lengths=(90, 130, 64), page_size=16),
)


@each_cache_kernel()
@pytest.mark.parametrize("case", OUT, ids=lambda case: case.id)
def test_out_is_written_and_returned_in_any_layout(case: CacheCase, device: str, impl: str) -> None:
    want = run(case.inputs(device), impl)["o"]
    batch, heads, length, width = want.shape
    wide = want.new_full((batch, length, heads + 1, width + 8), torch.nan)
    for out in (torch.full_like(want, torch.nan), wide[:, :, 1:, :width].transpose(1, 2)):
        got = flash_attention_with_kvcache(**case.inputs(device), out=out, impl=impl)
        assert got is out and torch.equal(got, want)
    assert wide[:, :, 0].isnan().all() and wide[..., width:].isnan().all()
    o, lse = flash_attention_with_kvcache(**case.inputs(device), out=out, return_lse=True, impl=impl)
    assert o is out and lse.dtype == torch.float32 and lse.shape == want.shape[:-1]


def test_out_has_the_layout_of_q(device: str) -> None:
    k_cache = torch.zeros(2, 2, 9, 16, device=device)
    for q in (torch.zeros(2, 4, 3, 16, device=device), torch.zeros(2, 3, 4, 16, device=device).transpose(1, 2)):
        o = flash_attention_with_kvcache(q, k_cache, k_cache[..., :8], cache_seqlens=9)
        assert o.shape == (2, 4, 3, 8) and (o.stride(1) > o.stride(2)) == (q.stride(1) > q.stride(2))


def test_one_int_is_the_length_of_all_sequences(device: str) -> None:
    case = CacheCase(lengths=(40, 40), seqlen_q=2)
    want = run(case.inputs(device), "auto")
    got = run(case.inputs(device) | {"cache_seqlens": 40}, "auto")
    assert all(same_bits(got[name], want[name]) for name in want)


@each_cache_kernel()
@pytest.mark.parametrize("append", [False, True])
def test_a_query_that_sees_no_key_has_zero_and_minus_infinity(append: bool, device: str, impl: str) -> None:
    tree = torch.zeros(3, 3, dtype=torch.bool, device=device)
    for options in ({"window_size": (0, 0)}, {"tree_mask": tree}):
        arguments = CacheCase(lengths=(0, 1, 30), seqlen_q=3, append=append).inputs(device) | options
        if "tree_mask" in options:  # of a cache that has no older token
            arguments["cache_seqlens"] = torch.tensor([0, 0, 0] if append else [0, 1, 3], dtype=int32, device=device)
        if not serves(impl, arguments):
            pytest.skip(f"{impl} does not take this")
        sinks = torch.tensor([0.5, -1, 2, 0], device=device)
        o, lse = run(arguments, impl).values()
        blind = lse == -torch.inf
        assert blind.any() == ("tree_mask" in options or not append)
        assert (o[blind] == 0).all() and not o.isnan().any() and not lse.isnan().any()
        o, lse = run(arguments | {"sinks": sinks}, impl).values()
        assert (o[blind] == 0).all() and torch.equal(lse[blind], sinks[None, :, None].expand_as(lse)[blind])


@each_cache_kernel()
def test_an_empty_batch_and_no_queries_work(device: str, impl: str) -> None:
    dtype = "f16" if impl == "tensor_core" else "f32"
    for case in (CacheCase(lengths=()), CacheCase(seqlen_q=0), CacheCase(seqlen_q=0, tree="one", page_size=3)):
        case = dataclasses.replace(case, dtype=dtype)
        o, lse = run(case.inputs(device), impl).values()
        assert o.shape == (case.batch, 4, case.seqlen_q, 32) and lse.shape == o.shape[:-1]


@each_cache_kernel()
def test_float8_caches_cost_what_rounding_to_them_costs(device: str, impl: str) -> None:
    """Against attention to the values before they were rounded: to 4 bits, by 2^-4 of a value at most."""
    random = torch.Generator().manual_seed(0)
    q, k, v, keys, values = (
        torch.randn(8, heads, length, 64, generator=random).to(device)
        for heads, length in ((4, 1), (2, 1), (2, 1), (2, 200), (2, 200))
    )
    scale = torch.tensor([0.02, 0.05], device=device)
    arguments = {"q": q.half(), "cache_seqlens": 199, "k_descale": scale, "v_descale": scale, "softmax_scale": 0.05}
    cached = {
        name: (x / scale.view(2, 1, 1)).clamp(-448, 448).to(FLOAT8)
        for name, x in (("k_cache", keys), ("v_cache", values))
    }
    arguments |= {"k": k.half(), "v": v.half(), **cached}
    if not serves(impl, arguments):
        pytest.skip(f"{impl} does not take this")
    got = run(arguments, impl)
    keys[:, :, 199:], values[:, :, 199:] = k, v
    o, lse = flash_attention(q, keys, values, softmax_scale=0.05, return_lse=True)
    assert (got["o"] - o).square().mean() < 2**-8 * o.square().mean()
    assert (got["lse"] - lse).abs().max() < 2**-4
    stored = cached["v_cache"][:, :, 199].float() * scale.view(2, 1)
    torch.testing.assert_close(stored, v[:, :, 0], rtol=2**-4, atol=0.05 * 2**-9)


@each_cache_kernel()
def test_what_float8_cannot_hold_is_stored_as_its_largest(device: str, impl: str) -> None:
    k = torch.tensor([1e4, -1e4, 448, -470, 480, 0.001, -0.0005, 0], device=device).view(1, 1, 1, 8).half()
    arguments = {"q": torch.zeros_like(k), "k": k, "v": k, "cache_seqlens": 0}
    arguments |= {name: torch.zeros(1, 1, 3, 8, device=device).to(FLOAT8) for name in ("k_cache", "v_cache")}
    if not serves(impl, arguments):
        pytest.skip(f"{impl} does not take this")
    run(arguments, impl)
    for name in ("k_cache", "v_cache"):
        stored = arguments[name][0, 0, 0].float().tolist()
        assert stored == [448, -448, 448, -448, 448, 2**-9, 0, 0]


def test_the_workspace_depends_on_no_length(device: str) -> None:
    for impl in CACHE_IMPLS[device]:
        sizes = set()
        for lengths in ((5, 0, 0), (300, 200, 0), (300, 300, 300)):
            case = CacheCase("bf16", head_dim=64, lengths=lengths, slack=400 - max(lengths))
            if serves(impl, case.inputs(device)):
                sizes.add(workspace_bytes_with_kvcache(**case.inputs(device), impl=impl))
        assert len(sizes) <= 1, impl
