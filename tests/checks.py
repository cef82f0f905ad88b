"""When a result is correct: its error is held against the float64 oracle and against the error of PyTorch's unfused
attention in the input dtype.

    max|x - ref|  <= 2   * max|standard - ref|  + 1e-5 * scale
    mean|x - ref| <= 1.5 * mean|standard - ref| + 1e-6 * scale

with infinities in the same places and no NaN. lse is float32 whatever the inputs are, so its `standard` is computed in
float32. float64 inputs have no `standard` but the oracle itself, so there the two constants shrink to 1e-11 and 1e-12.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flash_attention import flash_attention, flash_attention_varlen
from flash_attention.reference import reference_attention, reference_attention_varlen

from .cases import DTYPES, Case, Inputs

Results = dict[str, Tensor]  # "o", "lse", "d_q", … in this order

_MAX, _MEAN = (2.0, 1e-5), (1.5, 1e-6)
_MAX_FLOAT64, _MEAN_FLOAT64 = (2.0, 1e-11), (1.5, 1e-12)


@dataclasses.dataclass
class Expected:
    reference: Results
    standard: Results
    scale: dict[str, float]


def results(inputs: Inputs, attention: Callable[..., tuple[Tensor, Tensor]]) -> Results:
    """o, lse and the gradient of every leaf, under the case's d_o and d_lse."""
    o, lse = attention(*inputs.args, **inputs.options)
    leaves = tuple(inputs.leaves.values())
    if o.requires_grad:
        gradients = torch.autograd.grad((o, lse), leaves, (inputs.d_o.to(o.dtype), inputs.d_lse.to(lse.dtype)))
    else:  # the oracle makes o of nothing where there is no sequence
        gradients = tuple(map(torch.zeros_like, leaves))
    named = {f"d_{name}": gradient for name, gradient in zip(inputs.leaves, gradients, strict=True)}
    return {"o": o.detach(), "lse": lse.detach(), **named}


def run(inputs: Inputs, impl: str) -> Results:
    """The library's results."""
    function = flash_attention_varlen if inputs.case.packed else flash_attention
    return results(inputs, functools.partial(function, **inputs.max_seqlens, return_lse=True, impl=impl))


@functools.lru_cache(maxsize=8)
def expected(case: Case, device: str = "cpu") -> Expected:
    inputs = case.inputs(device)
    oracle = reference_attention_varlen if case.packed else reference_attention
    dtype = DTYPES[case.dtype]
    reference = results(inputs, oracle)
    standard = results(inputs, functools.partial(oracle, dtype=dtype))
    with torch.no_grad():
        exact = torch.promote_types(dtype, torch.float32)
        standard["lse"] = oracle(*inputs.args, **inputs.options, dtype=exact)[1]
    scale = {name: _magnitude(x) for name, x in reference.items()}
    # dS = P (dP - delta + d_lse) cancels where a row sees few keys, and rounding is relative to what cancels: the scale of
    # a gradient is the larger of its own and of what it is with d_lse = delta = rowsum(d_o * o), without the cancellation.
    delta = (inputs.d_o * reference["o"]).nan_to_num(0).sum(-1)  # padded rows of d_o are NaN
    inputs.d_lse = delta.T if case.packed else delta
    for name, x in results(inputs, oracle).items():
        scale[name] = max(scale[name], _magnitude(x))
    return Expected(reference, standard, scale)


def _magnitude(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def assert_correct(got: Results, case: Case, device: str = "cpu") -> None:
    """Raises AssertionError with one line for each tensor that fails."""
    want = expected(case, device)
    complaints = [c for name in want.reference if (c := _complaint(name, got[name], want, case.dtype == "f64"))]
    assert got.keys() == want.reference.keys()
    assert not complaints, "\n".join([case.id, *complaints])


def _complaint(name: str, x: Tensor, want: Expected, is_float64: bool) -> str | None:
    reference, standard = want.reference[name], want.standard[name]
    if x.shape != reference.shape or x.dtype != standard.dtype:
        return f"{name}: {x.dtype} {tuple(x.shape)}, expected {standard.dtype} {tuple(reference.shape)}"
    x = x.to(torch.float64)
    if x.isnan().any():
        return f"{name}: {x.isnan().sum()} of {x.numel()} are NaN, the first at {_where(x.isnan())}"
    misplaced = (x.isinf() | reference.isinf()) & (x != reference)
    if misplaced.any():
        at = _where(misplaced)
        return f"{name}: infinities differ in {misplaced.sum()} places, at {at}: got {x[at]}, expected {reference[at]}"
    finite = reference.isfinite()
    if not finite.any():
        return None
    error = torch.where(finite, (x - reference).abs(), 0)
    error_standard = (standard.to(torch.float64) - reference).abs()
    error_standard = error_standard[error_standard.isfinite()]  # what overflowed grants nothing
    if not error_standard.numel():
        error_standard = torch.zeros(1, dtype=torch.float64)
    count = finite.sum()
    for rule, value, of_standard, (factor, floor) in (
        ("max", error.max(), error_standard.max(), _MAX_FLOAT64 if is_float64 else _MAX),
        ("mean", error.sum() / count, error_standard.mean(), _MEAN_FLOAT64 if is_float64 else _MEAN),
    ):
        limit = factor * of_standard + floor * want.scale[name]
        if value > limit:
            at = _where(error == error.max())
            return (
                f"{name}: {rule} error {value:.3e} > {limit:.3e} (standard {of_standard:.3e}, scale {want.scale[name]:.3e}), "
                f"worst at {at}: got {x[at]:.9g}, expected {reference[at]:.9g}"
            )
    return None


def _where(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
