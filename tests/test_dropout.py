"""Dropout bits are a function of seed and position alone, at the rate asked for."""

import itertools

import pytest
import torch
from torch import Tensor

from flash_attention import StandardAttention, flash_attention, flash_attention_varlen
from flash_attention.reference import dropout_keep_mask

from .cases import DTYPES
from .conftest import each_kernel, each_kernel_and_dtype, near, skip_unless_served

Shape = tuple[int, int, int, int]  # batch, heads, seqlen_q, seqlen_k


def kept(shape: Shape, p: float, device: str, impl: str = "auto", dtype: torch.dtype = torch.float32, **seed) -> Tensor:
    """The entries that a kernel keeps, seen through it: one-hot values show the dropped P itself, 128 keys a call."""
    batch, heads, seqlen_q, seqlen_k = shape
    q, k = (torch.zeros(batch, heads, n, 8, dtype=dtype, device=device) for n in (seqlen_q, seqlen_k))
    v = one_hot(seqlen_k, dtype, device).expand(batch, heads, -1, -1)
    parts = [flash_attention(q, k, part, dropout_p=p, impl=impl, **seed) != 0 for part in v.split(128, dim=-1)]
    return torch.cat(parts, dim=-1)[..., :seqlen_k].cpu()


def one_hot(keys: int, dtype: torch.dtype, device: str) -> Tensor:
    """(keys, head_dim_v): row j is 1 at column j; few more columns than keys, so that rows are whole vectors."""
    return torch.eye(keys, -(-keys // 8) * 8, dtype=dtype, device=device)


# The definition knows no device, so that agreeing with it is agreeing with the other device.
@each_kernel()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1])
def test_bits_are_those_of_the_definition_in_every_kernel_and_dtype(
    seed: int, dtype: str, device: str, impl: str
) -> None:
    skip_unless_served(impl, dtype)
    shape = (2, 3, 37, 101)
    assert torch.equal(
        kept(shape, 0.4, device, impl, DTYPES[dtype], seed=seed), dropout_keep_mask(seed, 0, *shape, 0.4)
    )


@each_kernel_and_dtype()
def test_bits_of_long_rows_are_those_of_the_definition(device: str, impl: str, dtype: torch.dtype) -> None:
    shape = (1, 1, 300, 512)
    assert torch.equal(kept(shape, 0.1, device, impl, dtype, seed=5), dropout_keep_mask(5, 0, *shape, 0.1))


@each_kernel_and_dtype()
def test_a_packed_sequence_is_counted_by_its_number_and_its_own_rows(
    device: str, impl: str, dtype: torch.dtype
) -> None:
    lengths = (20, 0, 33)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    total = sum(lengths)
    q = k = torch.zeros(total, 2, 8, dtype=dtype, device=device)
    v = one_hot(total, dtype, device)[:, None].expand(-1, 2, -1)
    o = flash_attention_varlen(q, k, v, ends, ends, 33, 33, dropout_p=0.3, seed=9, impl=impl).cpu()
    mask = dropout_keep_mask(9, 0, 3, 2, 33, 33, 0.3)
    for b, length in enumerate(lengths):
        rows = slice(*ends[b : b + 2].tolist())
        assert torch.equal(o[rows, :, rows].transpose(0, 1) != 0, mask[b, :, :length, :length])


@each_kernel_and_dtype()
def test_bits_do_not_depend_on_strides_or_other_features(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k = (torch.randn(2, 3, n, 8, dtype=dtype, device=device) for n in (40, 50))
    v = one_hot(50, dtype, device).expand(2, 3, -1, -1)
    mask = dropout_keep_mask(1, 0, 2, 3, 40, 50, 0.5).to(device)
    swapped = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(flash_attention(*swapped, dropout_p=0.5, seed=1, impl=impl)[..., :50] != 0, mask)
    sinks = torch.zeros(3, device=device)
    o = flash_attention(q, k, v, dropout_p=0.5, seed=1, causal=True, softcap=5.0, sinks=sinks, impl=impl)
    visible = torch.ones(40, 50, device=device).tril(10).bool()
    assert torch.equal(o[..., :50] != 0, mask & visible)


def test_a_seed_tensor_equals_the_int(device: str) -> None:
    bits = 0x9E3779B97F4A7C15
    seed = torch.tensor([bits - 2**64], device=device)
    as_int, as_tensor = (kept((1, 1, 20, 30), 0.5, device, seed=x) for x in (bits, seed))
    assert torch.equal(as_int, as_tensor)


def test_manual_seed_governs_a_missing_seed(device: str) -> None:
    masks = []
    for manual_seed in (1, 1, 2):
        torch.manual_seed(manual_seed)
        masks += [kept((1, 2, 64, 64), 0.5, device) for _ in range(2)]
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[4])


def test_standard_attention_drops_the_same_entries(device: str) -> None:
    q, k, v = (torch.randn(2, 2, 40, 16, device=device) for _ in range(3))
    torch.manual_seed(3)
    ours = flash_attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, StandardAttention()(q, k, v, dropout_p=0.3))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_and_independence_are_those_of_fair_coins(p: float) -> None:
    mask = dropout_keep_mask(123, 0, 4, 4, 256, 256, p).double()
    deviation = (p * (1 - p)) ** 0.5
    centred = (mask - (1 - p)) / deviation

    def z(x: Tensor) -> float:  # standard normal if its elements are independent with unit variance
        return (x.mean() * x.numel() ** 0.5).abs().item()

    assert z(centred) < 5
    assert max(z(head) for head in centred.flatten(0, 1)) < 5
    for axis, step in itertools.product((0, 1, 2, 3), (1, 2)):
        assert z(centred * centred.roll(step, axis)) < 5, f"entries {step} apart along axis {axis} are not independent"
    other = (dropout_keep_mask(124, 0, 4, 4, 256, 256, p).double() - (1 - p)) / deviation
    assert z(centred * other) < 5


def test_no_dropout_is_exact_and_needs_no_seed(device: str) -> None:
    q, k, v = (torch.randn(1, 2, 40, 16, device=device) for _ in range(3))
    assert torch.equal(flash_attention(q, k, v, dropout_p=0.0, seed=7), flash_attention(q, k, v))


@each_kernel_and_dtype()
def test_dropout_leaves_lse_alone_and_scales_what_it_keeps(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k = (torch.randn(1, 2, n, 16, dtype=dtype, device=device) for n in (40, 60))
    v = one_hot(60, dtype, device).expand(1, 2, -1, -1)
    o, lse = flash_attention(q, k, v, return_lse=True, impl=impl)
    dropped, dropped_lse = flash_attention(q, k, v, dropout_p=0.25, seed=1, return_lse=True, impl=impl)
    if dtype == torch.float32:
        assert torch.equal(lse, dropped_lse)
    torch.testing.assert_close(dropped_lse, lse)  # float32 whatever the inputs are
    mask = dropout_keep_mask(1, 0, 1, 2, 40, 60, 0.25).to(device)
    torch.testing.assert_close(dropped[..., :60], o[..., :60] * mask / 0.75, **near(dtype))
