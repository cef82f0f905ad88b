"""Sizes past what 16 and 32 bits count: launch grids, and offsets into memory.

A part of a large tensor has the results of its small copy, whose offsets are small; that those are right is said
elsewhere.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flash_attention import flash_attention, flash_attention_with_kvcache

from .cache_checks import same_bits
from .cases import Case
from .checks import FORWARD_ONLY, assert_correct, run, serves
from .conftest import CACHE_IMPLS, IMPLS, each_cache_kernel, each_kernel

ROWS = 70000  # more than a grid has in y or z
each_gpu_kernel = pytest.mark.parametrize("impl", [impl for impl in IMPLS["cuda"] if impl != "auto"] or ["fused"])


@each_kernel("auto", "reference")
@pytest.mark.parametrize("sizes", [(ROWS, 1, 1), (1, ROWS, ROWS), (ROWS // 10, 10, 2)], ids=str)
def test_many_heads_and_sequences(sizes: tuple[int, int, int], device: str, impl: str) -> None:
    batch, heads_q, heads_kv = sizes
    case = Case("f32", 8, batch=batch, heads_q=heads_q, heads_kv=heads_kv, seqlen_q=1, seqlen_k=3, causal=True)
    if not serves(impl, case):
        case = dataclasses.replace(case, dtype="bf16")
    assert_correct(run(case.inputs(device), impl), case, device)


@pytest.mark.gpu
@each_gpu_kernel
def test_more_tiles_than_a_grid_has_in_y(impl: str) -> None:
    q, k, v = (normal(1, 1, length, 8) for length in (65536 * 128 + 1, 5, 5))
    o, lse = flash_attention(q, k, v, return_lse=True, impl=impl)
    last_o, last_lse = flash_attention(q[:, :, -1000:], k, v, return_lse=True, impl=impl)
    assert torch.equal(o[:, :, -1000:], last_o)
    assert torch.equal(lse[:, :, -1000:], last_lse)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("impl", ["fused", "tensor_core"])
def test_the_most_rows_that_a_sequence_may_have(impl: str) -> None:
    most = 2**31 - (1 + 1024 * (impl == "tensor_core"))  # as it says itself
    q = normal(1, 1, 1, 8).expand(-1, -1, most, -1)  # o takes 32 GiB
    k, v = normal(1, 1, 5, 8), normal(1, 1, 5, 8)
    o, lse = flash_attention(q, k, v, return_lse=True, impl=impl)
    one_o, one_lse = flash_attention(q[:, :, :1], k, v, return_lse=True, impl=impl)
    for rows in (o[:, :, :1000], o[:, :, -1000:]):
        assert torch.equal(rows, one_o.expand_as(rows))
    for rows in (lse[:, :, :1000], lse[:, :, -1000:]):
        assert torch.equal(rows, one_lse.expand_as(rows))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def results(impl: str, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> list[Tensor]:
    """o, lse and, where the kernel has a backward, d_q, d_k, d_v."""
    leaves = [x.detach().requires_grad_(impl not in FORWARD_ONLY) for x in (q, k, v)]
    o, lse = flash_attention(*leaves, return_lse=True, impl=impl)
    gradients = torch.autograd.grad(o, leaves, d_o) if o.requires_grad else ()
    return [x.detach() for x in (o, lse, *gradients)]


@pytest.mark.gpu
@pytest.mark.slow
@each_gpu_kernel
@pytest.mark.parametrize("axis", ["batch", "heads", "rows"])
def test_strides_beyond_32_bits(axis: str, impl: str) -> None:
    shape = (2, 3, 70, 64)
    strides = [3 * 70 * 64, 70 * 64, 64, 1]
    long = ("batch", "heads", "rows").index(axis)
    strides[long] = 2**31 // (shape[long] - 1) // 64 * 64 + 2**16  # the last step ends past 2^31 elements
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = torch.empty(span + 3 * 2**18, dtype=torch.bfloat16, device="cuda")  # 4 GiB
    views = [memory.as_strided(shape, strides, n * 2**18) for n in range(4)]  # q, k, v and d_o, side by side
    for view in views:
        view.copy_(normal(*shape))
    for x, y in zip(results(impl, *views), results(impl, *(view.contiguous() for view in views)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.slow
@each_gpu_kernel
def test_results_of_more_than_32_bits(impl: str) -> None:
    heads, seqlen_q, seqlen_k, head_dim = 520, 33000, 16, 128
    assert heads * seqlen_q * head_dim > 2**31
    # One head of q and one row of d_o serve all: o and d_q are what takes 4 GiB each.
    q = normal(1, 1, seqlen_q, head_dim).expand(1, heads, -1, -1)
    d_o = normal(1, 1, 1, head_dim).expand(1, heads, seqlen_q, -1)
    k, v = normal(1, heads, seqlen_k, head_dim), normal(1, heads, seqlen_k, head_dim)
    got = results(impl, q, k, v, d_o)
    for h in (0, heads // 2, heads - 1):
        alone = results(impl, *(x[:, h : h + 1] for x in (q, k, v, d_o)))
        for x, y in zip(got, alone, strict=True):
            torch.testing.assert_close(x[:, h : h + 1], y, rtol=2e-2, atol=1e-3)


@each_cache_kernel("auto", "reference")
def test_pages_past_two_to_the_31_elements(device: str, impl: str) -> None:
    """On a CPU memory that nobody touches is not there: the machine needs none of the 4 GiB."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        pages = 2**31 // (8 * 64 * 128) + 4
        large = torch.empty(pages, 8, 64, 128, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    table = torch.tensor([[pages - 1, 0], [pages - 2, pages - 3], [1, pages - 4]], dtype=torch.int32, device=device)
    renumbered = torch.arange(6, dtype=torch.int32, device=device).view(3, 2)
    small = torch.randn(6, 8, 64, 128, device=device).to(torch.bfloat16)
    large[table.flatten().long()] = small
    q, k, v = (torch.randn(3, heads, 1, 64, device=device).to(torch.bfloat16) for heads in (16, 8, 8))
    lengths = torch.tensor([100, 64, 127], dtype=torch.int32, device=device)

    def call(cache: Tensor, table: Tensor) -> Tensor:
        return flash_attention_with_kvcache(
            q, cache[..., :64], cache[..., 64:], k, v, cache_seqlens=lengths, page_table=table, impl=impl
        )

    assert same_bits(call(large, table), call(small, renumbered))
    assert same_bits(large[table.flatten().long()], small)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [impl for impl in CACHE_IMPLS["cuda"] if impl != "auto"] or ["fused"])
def test_a_sequence_past_two_to_the_31_elements(impl: str) -> None:
    length = 2**31 // (8 * 128) + 1000
    k_cache, v_cache = (normal(1, 8, length, 128) for _ in range(2))
    k_cache[:, :, :-50] *= 0.1
    q = k_cache[:, :, -1:] * 4  # weighs its own key alone: e^45 against 2^18 others
    o = flash_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=length, impl=impl)
    torch.testing.assert_close(o, flash_attention(q, k_cache[:, :, -50:], v_cache[:, :, -50:]), rtol=0, atol=0.05)
