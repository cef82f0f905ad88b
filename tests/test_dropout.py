"""Dropout bits are a function of seed and position alone, at the rate asked for."""

import itertools

import pytest
import torch
from torch import Tensor

from flash_attention import StandardAttention, flash_attention, flash_attention_varlen
from flash_attention.reference import dropout_keep_mask

from .cases import DTYPES
from .conftest import each_kernel, skip_unless_served

Shape = tuple[int, int, int, int]  # batch, heads, seqlen_q, seqlen_k


def kept(shape: Shape, p: float, device: str, impl: str = "auto", dtype: torch.dtype = torch.float32, **seed) -> Tensor:
    """The entries that a kernel keeps, seen through it: one-hot values show the dropped P itself."""
    batch, heads, seqlen_q, seqlen_k = shape
    q, k = (torch.zeros(batch, heads, n, 8, dtype=dtype, device=device) for n in (seqlen_q, seqlen_k))
    v = torch.eye(seqlen_k, dtype=dtype, device=device).expand(batch, heads, seqlen_k, seqlen_k)
    return (flash_attention(q, k, v, dropout_p=p, impl=impl, **seed) != 0).cpu()


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


@each_kernel()
def test_bits_of_long_rows_are_those_of_the_definition(device: str, impl: str) -> None:
    shape = (1, 1, 300, 512)
    assert torch.equal(kept(shape, 0.1, device, impl, seed=5), dropout_keep_mask(5, 0, *shape, 0.1))


@each_kernel()
def test_a_packed_sequence_is_counted_by_its_number_and_its_own_rows(device: str, impl: str) -> None:
    lengths = (20, 0, 33)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    total = sum(lengths)
    q = k = torch.zeros(total, 2, 8, device=device)
    v = torch.eye(total, device=device)[:, None].expand(total, 2, total)
    o = flash_attention_varlen(q, k, v, ends, ends, 33, 33, dropout_p=0.3, seed=9, impl=impl).cpu()
    mask = dropout_keep_mask(9, 0, 3, 2, 33, 33, 0.3)
    for b, length in enumerate(lengths):
        rows = slice(*ends[b : b + 2].tolist())
        assert torch.equal(o[rows, :, rows].transpose(0, 1) != 0, mask[b, :, :length, :length])


@each_kernel()
def test_bits_do_not_depend_on_strides_or_other_features(device: str, impl: str) -> None:
    q, k = torch.randn(2, 3, 40, 8, device=device), torch.randn(2, 3, 50, 8, device=device)
    v = torch.eye(50, device=device).expand(2, 3, 50, 50)
    mask = dropout_keep_mask(1, 0, 2, 3, 40, 50, 0.5).to(device)
    swapped = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(flash_attention(*swapped, dropout_p=0.5, seed=1, impl=impl) != 0, mask)
    sinks = torch.zeros(3, device=device)
    o = flash_attention(q, k, v, dropout_p=0.5, seed=1, causal=True, softcap=5.0, sinks=sinks, impl=impl)
    visible = torch.ones(40, 50, device=device).tril(10).bool()
    assert torch.equal(o != 0, mask & visible)


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


@each_kernel()
def test_dropout_leaves_lse_alone_and_scales_what_it_keeps(device: str, impl: str) -> None:
    q, k = torch.randn(1, 2, 40, 16, device=device), torch.randn(1, 2, 60, 16, device=device)
    v = torch.eye(60, device=device).expand(1, 2, 60, 60)
    o, lse = flash_attention(q, k, v, return_lse=True, impl=impl)
    dropped, dropped_lse = flash_attention(q, k, v, dropout_p=0.25, seed=1, return_lse=True, impl=impl)
    assert torch.equal(lse, dropped_lse)
    mask = dropout_keep_mask(1, 0, 1, 2, 40, 60, 0.25).to(device)
    torch.testing.assert_close(dropped, o * mask / 0.75)
