"""Scores far outside a model's usual range, gradients that are not finite, sums of very many terms."""

from __future__ import annotations

import math

import pytest
import torch

from flash_attention import flash_attention
from flash_attention.reference import reference_attention

from .conftest import each_kernel, each_kernel_and_dtype, skip_unless_served

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def qkv(dtype: torch.dtype, seqlen_q: int, seqlen_k: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, n, 16) for n in (seqlen_q, seqlen_k, seqlen_k))
    return tuple(torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("lowest", (None, -1e4, -1e9, -1e10, -1e30))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel(backward=True)
def test_left_padding_by_a_low_finite_bias_hides_keys(
    device: str, impl: str, dtype: torch.dtype, lowest: float | None
) -> None:
    """As models write masks: the lowest number of the dtype, or one of float32."""
    skip_unless_served(impl, dtype)
    q, k, v = qkv(dtype, 40, 600, device)
    bias_dtype = torch.promote_types(dtype, torch.float32) if lowest else dtype
    bias = torch.zeros(1, 1, 1, 600, dtype=bias_dtype, device=device)
    bias[..., :300] = lowest or torch.finfo(dtype).min  # the first block of keys is hidden as a whole
    results = [
        flash_attention(q, k, v, bias=bias, impl=impl),
        flash_attention(q, k[:, :, 300:], v[:, :, 300:], impl=impl),
    ]
    gradients = [torch.autograd.grad(o.double().square().sum(), (q, k, v)) for o in results]
    tolerance = {"rtol": 0, "atol": 40 * torch.finfo(dtype).eps}
    for got, expected in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@each_kernel_and_dtype("auto")
def test_a_row_of_equal_lowest_scores_is_the_mean_of_v(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in qkv(dtype, 3, 600, device))
    bias = torch.full((1, 1, 3, 600), torch.finfo(torch.float32).min, device=device)
    o = flash_attention(q, k, v, bias=bias, impl=impl)
    expected = v.double().mean(dim=2, keepdim=True).expand_as(o)
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-3)


@each_kernel("auto", backward=True)
def test_a_row_of_equal_lowest_scores_shares_its_gradient_equally(device: str, impl: str) -> None:
    skip_unless_served(impl, torch.float32)
    q, k, v = qkv(torch.float32, 3, 600, device)
    bias = torch.full((1, 1, 3, 600), torch.finfo(torch.float32).min, device=device)
    d_v = torch.autograd.grad(flash_attention(q, k, v, bias=bias, impl=impl).sum(), v)[0]
    torch.testing.assert_close(d_v, torch.full_like(d_v, 3 / 600), rtol=1e-5, atol=0)


@each_kernel_and_dtype()
def test_a_scale_that_float32_rounds_to_zero_is_zero(device: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in qkv(dtype, 70, 40, device))
    results = [
        flash_attention(q, k, v, softmax_scale=scale, causal=True, return_lse=True, impl=impl) for scale in (1e-50, 0.0)
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("scale", (1e4, 4e9, 1e20))
@each_kernel_and_dtype("auto")
def test_huge_scores_choose_the_largest(device: str, impl: str, dtype: torch.dtype, scale: float) -> None:
    q, k, v = (x.detach() for x in qkv(dtype, 50, 300, device))
    o = flash_attention(q, k, v, softmax_scale=scale, impl=impl)
    expected, _ = reference_attention(q, k, v, softmax_scale=scale)
    wrong = ~((o - expected).abs().amax(-1) <= (1e-4 if dtype == torch.float32 else 4e-3))  # NaN is wrong
    assert wrong.double().mean() <= (0.05 if scale == 1e4 else 0.0)  # near ties at 1e4 round either way in float32


@each_kernel_and_dtype("auto", backward=True)
def test_rows_without_keys_give_no_gradient_even_to_gradients_that_are_not_finite(
    device: str, impl: str, dtype: torch.dtype
) -> None:
    q, k, v = qkv(dtype, 10, 5, device)
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True, impl=impl)
    blind = lse.isinf()
    assert blind.sum() == 2 * 5
    d_o = torch.ones_like(o).masked_fill(blind[..., None], math.inf)
    d_lse = torch.zeros_like(lse).masked_fill(blind, math.nan)
    got = torch.autograd.grad((o, lse), (q, k, v), (d_o, d_lse))
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True, impl=impl)
    finite = (d_o.nan_to_num(posinf=0), torch.zeros_like(lse))
    for x, y in zip(got, torch.autograd.grad((o, lse), (q, k, v), finite), strict=True):
        assert torch.equal(x, y)


@each_kernel("auto", "reference", backward=True)
def test_a_bias_of_one_element_sums_all_its_scores(device: str, impl: str) -> None:
    skip_unless_served(impl, torch.float32)
    q, k, v = (x.detach() for x in qkv(torch.float32, 4096, 1024, device))
    bias = torch.zeros(1, 1, 1, 1, device=device, requires_grad=True)
    _, lse = flash_attention(q, k, v, bias=bias, return_lse=True, impl=impl)
    d_bias = torch.autograd.grad(lse.sum(), bias)[0]  # each row's P sums to one
    assert d_bias.item() == pytest.approx(2 * 4096, rel=1e-5)


@pytest.mark.parametrize("offset", (100.0, -100.0, 8192.0, -8192.0))
@each_kernel("auto", backward=True)
def test_adding_one_number_to_all_scores_and_the_sink_changes_no_gradient(
    device: str, impl: str, offset: float
) -> None:
    skip_unless_served(impl, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def eighths(most: int, *shape: int) -> torch.Tensor:  # scores are sums of such numbers: float32 holds them exactly
        return (torch.randint(-most, most + 1, shape, generator=generator) / 8).to(device).requires_grad_()

    q, k, v = eighths(16, 2, 4, 70, 16), eighths(16, 2, 2, 150, 16), eighths(16, 2, 2, 150, 24)
    bias, sinks = eighths(8, 4, 70, 150), eighths(32, 4)
    slopes = torch.tensor([2.0**-n for n in range(3, 7)], device=device, requires_grad=True)
    d_o, d_lse = eighths(8, 2, 4, 70, 24).detach(), eighths(8, 2, 4, 70).detach()

    def attend(offset: float) -> tuple[torch.Tensor, ...]:
        extras = {"bias": bias + offset, "sinks": sinks + offset, "alibi_slopes": slopes}
        o, lse = flash_attention(q, k, v, **extras, softmax_scale=0.125, causal=True, return_lse=True, impl=impl)
        gradients = torch.autograd.grad((o, lse), (q, k, v, bias, slopes, sinks), (d_o, d_lse))
        return lse - offset, o, *gradients

    (lse, *got), (expected_lse, *expected) = attend(offset), attend(0.0)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-5 + abs(offset) * 2**-23)
    names = ("o", "d_q", "d_k", "d_v", "d_bias", "d_slopes", "d_sinks")
    errors = {n: (x - y).abs().max() / y.abs().max() for n, x, y in zip(names, got, expected, strict=True)}
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("option", ({"softcap": 1e39}, {"softcap": 1e-50}, {"softmax_scale": 1e39}), ids=str)
def test_options_that_float32_cannot_hold_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="float32 arithmetic"):
        flash_attention(*qkv(torch.float32, 4, 4), **option)


def test_a_second_derivative_is_refused() -> None:
    q, k, v = qkv(torch.float64, 4, 4)
    (d_q,) = torch.autograd.grad(flash_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        d_q.square().sum().backward()


WRONG_TYPES = {
    "float window": {"window_size": (1.0, 0)},
    "no window": {"window_size": (None, 0)},
    "no softcap": {"softcap": None},
    "scale as text": {"softmax_scale": "1"},
    "dropout as text": {"dropout_p": "0.1"},
    "no impl": {"impl": None},
    "bias as list": {"bias": [1.0]},
    "lengths as list": {"seqlens_k": [4]},
}


@pytest.mark.parametrize("option", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_options_of_a_wrong_type_are_refused_by_name(option: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=next(iter(option))):
        flash_attention(*qkv(torch.float32, 4, 4), **option)


def test_a_window_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="window_size"):
        flash_attention(*qkv(torch.float32, 4, 4), window_size=(2**70, 0))


@each_kernel_and_dtype("auto", "reference")
def test_what_is_not_a_number_stays_in_sight(device: str, impl: str, dtype: torch.dtype) -> None:
    """A NaN makes each result that depends on it NaN, however softmax is put together, and no other row."""
    for name in ("q", "k", "sinks"):
        q, k, v = (x.detach() for x in qkv(dtype, 40, 70, device))
        tensors = {"q": q, "k": k, "v": v, "sinks": torch.zeros(2, device=device)}
        tensors[name][(0,) * tensors[name].dim()] = math.nan
        o, lse = flash_attention(**tensors, dropout_p=0.5, seed=1, return_lse=True, impl=impl)
        hit = torch.zeros(1, 2, 40, dtype=torch.bool, device=device)
        hit[:, 0, : 1 if name == "q" else None] = True
        assert torch.equal(lse.isnan(), hit), name
        assert torch.equal(o.isnan().all(-1), hit) and torch.equal(o.isnan().any(-1), hit), name
