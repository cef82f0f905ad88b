"""What the definition says at its edges, stated directly rather than through the oracle."""

import math

import pytest
import torch
from torch import Tensor

from flash_attention import flash_attention, flash_attention_varlen

from .conftest import IMPLS

impls = pytest.mark.parametrize("impl", IMPLS["cpu"])


def qkv(seqlen_q: int = 20, seqlen_k: int = 30, *, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    lengths = (seqlen_q, seqlen_k, seqlen_k)
    return [torch.randn(batch, 2, length, 16).to(dtype).requires_grad_() for length in lengths]


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_keys_are_zero(impl: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(50, 30, dtype=dtype)  # bottom-right causal: the first 20 rows stand before every key
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True, impl=impl)
    assert (o[:, :, :20] == 0).all()
    assert (lse[:, :, :20] == -math.inf).all()
    assert lse[:, :, 20:].isfinite().all()
    (o.sum() + lse[lse.isfinite()].sum()).backward()
    assert (q.grad[:, :, :20] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@impls
def test_a_row_whose_bias_is_minus_infinity_sees_no_key(impl: str) -> None:
    q, k, v = qkv()
    bias = torch.zeros(20, 30)
    bias[7] = -math.inf
    bias.requires_grad_()
    o, lse = flash_attention(q, k, v, bias=bias, return_lse=True, impl=impl)
    o.sum().backward()
    assert (o[:, :, 7] == 0).all()
    assert (lse[:, :, 7] == -math.inf).all()
    assert (bias.grad[7] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v, bias))


@impls
def test_with_a_sink_a_row_without_keys_has_lse_equal_to_the_sink(impl: str) -> None:
    q, k, v = qkv(50, 30)
    sinks = torch.tensor([0.5, -2.0], requires_grad=True)
    o, lse = flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True, impl=impl)
    assert (o[:, :, :20] == 0).all()
    assert torch.equal(lse[:, :, :20], sinks.detach().view(1, 2, 1).expand(2, 2, 20))
    lse[:, :, :20].sum().backward()
    assert sinks.grad.tolist() == pytest.approx([40, 40])


@impls
def test_a_sink_takes_its_share_of_the_probability(impl: str) -> None:
    q, k, v = qkv()
    plain, plain_lse = flash_attention(q, k, v, return_lse=True, impl=impl)
    o, lse = flash_attention(q, k, v, sinks=torch.zeros(2), return_lse=True, impl=impl)
    torch.testing.assert_close(o, plain * torch.sigmoid(plain_lse)[..., None])
    torch.testing.assert_close(lse, torch.log1p(plain_lse.exp()))


@impls
def test_a_sink_of_minus_infinity_is_none(impl: str) -> None:
    q, k, v = qkv(50, 30)
    none = flash_attention(q, k, v, causal=True, return_lse=True, impl=impl)
    gone = flash_attention(q, k, v, causal=True, sinks=torch.full((2,), -math.inf), return_lse=True, impl=impl)
    assert torch.equal(none[0], gone[0])
    assert torch.equal(none[1], gone[1])


@impls
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 30), (20, 30), (30, 30)])
def test_causal_is_aligned_bottom_right(seqlen_q: int, seqlen_k: int, impl: str) -> None:
    q, k, v = qkv(seqlen_q, seqlen_k)
    o = flash_attention(q, k, v, causal=True, impl=impl)
    for i in range(seqlen_q):
        seen = seqlen_k - seqlen_q + i + 1
        alone = flash_attention(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen], impl=impl)
        torch.testing.assert_close(o[:, :, i : i + 1], alone)


@impls
def test_padded_rows_take_and_give_no_gradient(impl: str) -> None:
    q, k, v = qkv()
    lengths = {"seqlens_q": torch.tensor([12, 20]), "seqlens_k": torch.tensor([30, 7])}
    lengths = {name: x.int() for name, x in lengths.items()}
    with torch.no_grad():
        q[0, :, 12:] = math.nan
        k[1, :, 7:] = math.nan
        v[1, :, 7:] = math.nan
    o, lse = flash_attention(q, k, v, **lengths, return_lse=True, impl=impl)
    assert (o[0, :, 12:] == 0).all()
    assert (lse[0, :, 12:] == -math.inf).all()
    d_o, d_lse = torch.randn_like(o), torch.randn_like(lse)
    d_o[0, :, 12:] = math.nan
    d_lse[0, :, 12:] = math.nan
    torch.autograd.backward((o, lse), (d_o, d_lse))
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[0, :, 12:] == 0).all()
    assert (k.grad[1, :, 7:] == 0).all()
    assert (v.grad[1, :, 7:] == 0).all()


@impls
def test_packed_rows_past_the_last_sequence_are_zero(impl: str) -> None:
    q, k, v = (torch.randn(20, 2, 16, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, 5, 14], dtype=torch.int32)
    o, lse = flash_attention_varlen(q, k, v, ends, ends, 9, 9, return_lse=True, impl=impl)
    o.sum().backward()
    assert (o[14:] == 0).all()
    assert (lse[:, 14:] == -math.inf).all()
    assert all((x.grad[14:] == 0).all() for x in (q, k, v))


@impls
def test_a_gradient_without_strides_is_taken(impl: str) -> None:
    q, k, v = qkv()
    by_sum = torch.autograd.grad(flash_attention(q, k, v, impl=impl).sum(), (q, k, v))  # d_o is one expanded number
    o = flash_attention(q, k, v, impl=impl)
    for got, expected in zip(by_sum, torch.autograd.grad(o, (q, k, v), torch.ones_like(o)), strict=True):
        assert torch.equal(got, expected)


@impls
def test_lse_alone_has_a_gradient(impl: str) -> None:
    q, k, v = qkv()
    flash_attention(q, k, v, return_lse=True, impl=impl)[1].sum().backward()
    torch.testing.assert_close(k.grad.sum(2), (q / 4).sum(2))  # each row's probabilities sum to one; scale is 16^-1/2
    assert v.grad is None or (v.grad == 0).all()


@impls
def test_o_has_the_layout_of_q(impl: str) -> None:
    q, k, v = (x.detach() for x in qkv())
    assert flash_attention(q, k, v, impl=impl).is_contiguous()
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    o = flash_attention(*swapped, impl=impl)
    assert o.transpose(1, 2).is_contiguous()
    assert torch.equal(o, flash_attention(q, k, v, impl=impl))


@impls
def test_inputs_are_not_written(impl: str) -> None:
    q, k, v = qkv()
    before = [x.detach().clone() for x in (q, k, v)]
    flash_attention(q, k, v, causal=True, impl=impl).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
