"""What the definition says at its edges, stated directly rather than through the oracle."""

import math

import pytest
import torch
from torch import Tensor

from flash_attention import flash_attention, flash_attention_varlen

from .conftest import each_kernel, each_kernel_and_dtype, near, skip_unless_served

each = each_kernel_and_dtype()
each_with_backward = each_kernel_and_dtype(backward=True)


def qkv(device: str, seqlen_q: int = 20, seqlen_k: int = 30, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    lengths = (seqlen_q, seqlen_k, seqlen_k)
    return [torch.randn(2, 2, length, 16).to(device, dtype).requires_grad_() for length in lengths]


@each_kernel(backward=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_keys_are_zero(device: str, impl: str, dtype: torch.dtype) -> None:
    skip_unless_served(impl, dtype)
    q, k, v = qkv(device, 50, 30, dtype)  # bottom-right causal: the first 20 rows stand before every key
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True, impl=impl)
    assert (o[:, :, :20] == 0).all()
    assert (lse[:, :, :20] == -math.inf).all()
    assert lse[:, :, 20:].isfinite().all()
    (o.sum() + lse[lse.isfinite()].sum()).backward()
    assert (q.grad[:, :, :20] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@each_with_backward
def test_a_row_whose_bias_is_minus_infinity_sees_no_key(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(device, dtype=dtype)
    bias = torch.zeros(20, 30, device=device)
    bias[7] = -math.inf
    bias.requires_grad_()
    o, lse = flash_attention(q, k, v, bias=bias, return_lse=True, impl=impl)
    o.sum().backward()
    assert (o[:, :, 7] == 0).all()
    assert (lse[:, :, 7] == -math.inf).all()
    assert (bias.grad[7] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v, bias))


@each_with_backward
def test_with_a_sink_a_row_without_keys_has_lse_equal_to_the_sink(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(device, 50, 30, dtype)
    sinks = torch.tensor([0.5, -2.0], device=device, requires_grad=True)
    o, lse = flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True, impl=impl)
    assert (o[:, :, :20] == 0).all()
    assert torch.equal(lse[:, :, :20], sinks.detach().view(1, 2, 1).expand(2, 2, 20))
    lse[:, :, :20].sum().backward()
    assert sinks.grad.tolist() == pytest.approx([40, 40])


@each
def test_a_sink_takes_its_share_of_the_probability(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(device, dtype=dtype)
    plain, plain_lse = flash_attention(q, k, v, return_lse=True, impl=impl)
    o, lse = flash_attention(q, k, v, sinks=torch.zeros(2, device=device), return_lse=True, impl=impl)
    expected = plain * torch.sigmoid(plain_lse)[..., None]
    torch.testing.assert_close(o.to(expected.dtype), expected, **near(dtype))
    torch.testing.assert_close(lse, torch.log1p(plain_lse.exp()))


@each
def test_a_sink_of_minus_infinity_is_none(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(device, 50, 30, dtype)
    none = flash_attention(q, k, v, causal=True, return_lse=True, impl=impl)
    sinks = torch.full((2,), -math.inf, device=device)
    gone = flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True, impl=impl)
    assert torch.equal(none[0], gone[0])
    assert torch.equal(none[1], gone[1])


@each
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 30), (20, 30), (30, 30)])
def test_causal_is_aligned_bottom_right(
    seqlen_q: int, seqlen_k: int, device: str, impl: str, dtype: torch.dtype
) -> None:
    q, k, v = qkv(device, seqlen_q, seqlen_k, dtype)
    o = flash_attention(q, k, v, causal=True, impl=impl)
    for i in range(seqlen_q):
        seen = seqlen_k - seqlen_q + i + 1
        alone = flash_attention(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen], impl=impl)
        torch.testing.assert_close(o[:, :, i : i + 1], alone, **near(dtype))


@each_with_backward
def test_padded_rows_take_and_give_no_gradient(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(device, dtype=dtype)
    lengths = {"seqlens_q": torch.tensor([12, 20]), "seqlens_k": torch.tensor([30, 7])}
    lengths = {name: x.to(device, torch.int32) for name, x in lengths.items()}
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


@each_with_backward
def test_packed_rows_past_the_last_sequence_are_zero(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(20, 2, 16, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, 5, 14], dtype=torch.int32, device=device)
    o, lse = flash_attention_varlen(q, k, v, ends, ends, 9, 9, return_lse=True, impl=impl)
    o.sum().backward()
    assert (o[14:] == 0).all()
    assert (lse[:, 14:] == -math.inf).all()
    assert all((x.grad[14:] == 0).all() for x in (q, k, v))


@each_with_backward
def test_a_gradient_without_strides_is_taken(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(device, dtype=dtype)
    by_sum = torch.autograd.grad(flash_attention(q, k, v, impl=impl).sum(), (q, k, v))  # d_o is one expanded number
    o = flash_attention(q, k, v, impl=impl)
    for got, expected in zip(by_sum, torch.autograd.grad(o, (q, k, v), torch.ones_like(o)), strict=True):
        assert torch.equal(got, expected)


@each_with_backward
def test_lse_alone_has_a_gradient(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(device, dtype=dtype)
    flash_attention(q, k, v, return_lse=True, impl=impl)[1].sum().backward()
    # Each row's probabilities sum to one; scale is 16^-1/2.
    torch.testing.assert_close(k.grad.float().sum(2), (q.float() / 4).sum(2), **near(dtype, 20))
    assert v.grad is None or (v.grad == 0).all()


@each
def test_o_has_the_layout_of_q(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in qkv(device, dtype=dtype))
    assert flash_attention(q, k, v, impl=impl).is_contiguous()
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    o = flash_attention(*swapped, impl=impl)
    assert o.transpose(1, 2).is_contiguous()
    assert torch.equal(o, flash_attention(q, k, v, impl=impl))


@each_with_backward
def test_inputs_are_not_written(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(device, dtype=dtype)
    before = [x.detach().clone() for x in (q, k, v)]
    flash_attention(q, k, v, causal=True, impl=impl).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@each_kernel()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_no_alignment_changes_a_bit(dtype: torch.dtype, device: str, impl: str) -> None:
    """But `auto`, which is then another kernel, and one that refuses what is not aligned to 16 bytes."""
    skip_unless_served(impl, dtype)
    q, k, v = (x.detach() for x in qkv(device, 20, 30, dtype))
    o = flash_attention(q, k, v, causal=True, impl=impl)

    def moved(x: Tensor, offset: int, gap: int) -> Tensor:
        """The same values, `offset` elements past an aligned address, rows `gap` elements further apart."""
        memory = x.new_full((offset + 2 * 2 * x.shape[2] * (16 + gap),), math.nan)
        view = memory[offset:].view(2, 2, x.shape[2], 16 + gap)[..., :16]
        return view.copy_(x)

    for offset in (0, 1, 2, 4, 8):
        for gap in (0, 1, 2, 4, 8):
            tensors = (moved(q, offset, gap), moved(k, 8 - offset, gap), moved(v, offset, 8 - gap))
            aligned = all(x % 16 == 0 for t in tensors for x in (t.data_ptr(), t.stride(2) * t.element_size()))
            if impl == "tensor_core" and not aligned:
                with pytest.raises(ValueError, match="takes rows of whole 16 bytes"):
                    flash_attention(*tensors, causal=True, impl=impl)
                continue
            got = flash_attention(*tensors, causal=True, impl=impl)
            if impl == "auto" and not aligned:
                atol = 16 * torch.finfo(dtype).eps
                torch.testing.assert_close(got, o, rtol=0, atol=atol, msg=str((offset, gap)))
            else:
                assert torch.equal(got, o), (offset, gap)
