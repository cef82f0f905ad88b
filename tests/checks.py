"""When a result is correct: its error is held against the float64 oracle and against the error of PyTorch's unfused
attention in the input dtype.

    max|x - ref|  <= 2   * max|standard - ref|  + 1e-5 * scale
    mean|x - ref| <= 1.5 * mean|standard - ref| + 1e-6 * scale

with infinities in the same places and no NaN. lse is float32 whatever the inputs are, so its `standard` is computed in
float32. float64 inputs have no `standard` but the oracle itself, so there the two constants shrink to 1e-11 and 1e-12.

What `standard` is spared by luck counts as its error too:
  - A backward pass is given o in the input dtype, and delta = rowsum(d_o * o) inherits the rounding. Unfused attention
    keeps P instead, and is exact where a row sees one key. So its error is at least that of the exact gradient with
    the delta of the rounded o.
  - The error of few rows, or of a tensor of few elements, is chance: one rounding to bfloat16 may be exact, one sum may
    cancel. So below 512 of either, error and scale are the largest over the same case with 48 other seeds; and below 16
    a mean is no other number than the maximum, whose rule it is held to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attention import explain, flash_attention, flash_attention_varlen
from flash_attention.reference import reference_attention, reference_attention_varlen

from .cases import DTYPES, Case, Inputs

Results = dict[str, Tensor]  # "o", "lse", "d_q", … in this order

_TINY = torch.zeros(1, 1, 1, 8)
FORWARD_ONLY = frozenset(
    row.impl for row in explain(_TINY, _TINY, _TINY, backward=True) if "has no backward" in row.verdict
)

_MAX, _MEAN = (2.0, 1e-5), (1.5, 1e-6)
_VERY_FEW, _FEW, _DRAWS = 16, 512, 48
_MAX_FLOAT64, _MEAN_FLOAT64 = (2.0, 1e-11), (1.5, 1e-12)


@dataclasses.dataclass
class Expected:
    reference: Results
    standard_errors: dict[str, tuple[float, float]]  # largest and mean
    scale: dict[str, float]
    dtype: dict[str, torch.dtype]


def promises(impl: str, dtype: str | torch.dtype, *head_dims: int, aligned: bool = True) -> bool:
    """What each kernel has to serve, and by name may not refuse, said apart from what it does refuse.

    Args:
        head_dims: D and Dv, if they may be any but few multiples of 8.
        aligned: rows of whole head_dims, as torch allocates them.
    """
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if impl == "split":
        return dtype != torch.float64
    if impl == "tensor_core":
        widest = {2: 256, 4: 128, 8: 0}[dtype.itemsize]
        return aligned and widest > 0 and all(dim * dtype.itemsize % 16 == 0 and dim <= widest for dim in head_dims)
    return True


def serves(impl: str, case: Case) -> bool:
    """Whether the kernel promises the case."""
    head_dims = case.head_dim, case.head_dim_v or case.head_dim
    return promises(impl, case.dtype, *head_dims, aligned=case.layout not in ("gaps", "mixed"))  # mixed: q has gaps


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
    """The library's results; of a kernel without a backward o and lse."""
    function = flash_attention_varlen if inputs.case.packed else flash_attention
    attention = functools.partial(function, **inputs.max_seqlens, return_lse=True, impl=impl)
    if impl in FORWARD_ONLY:
        with torch.no_grad():
            return dict(zip(("o", "lse"), attention(*inputs.args, **inputs.options), strict=True))
    return results(inputs, attention)


@functools.lru_cache(maxsize=8)
def expected(case: Case, device: str = "cpu") -> Expected:
    inputs = case.inputs(device)
    exact = inputs.in_float64()
    oracle = reference_attention_varlen if case.packed else reference_attention
    dtype = DTYPES[case.dtype]
    reference = results(exact, oracle)
    standard = results(inputs, functools.partial(oracle, dtype=dtype))
    with torch.no_grad():
        standard["lse"] = oracle(*inputs.args, **inputs.options, dtype=torch.promote_types(dtype, torch.float32))[1]
    errors, scale = errors_and_scale(standard, reference)

    # dS = P (dP - delta + d_lse), so that d_lse can take delta out and put another in. Without any, nothing cancels:
    # rounding is relative to that, and so is the scale of a gradient that cancels.
    d_lse = exact.d_lse
    delta, delta_of_rounded_o = (
        (exact.d_o * o).nan_to_num(0).sum(-1)  # padded rows of d_o are NaN
        for o in (reference["o"], reference["o"].to(dtype).to(torch.float64))
    )
    exact.d_lse = delta.T if case.packed else delta
    for name, x in results(exact, oracle).items():
        scale[name] = max(scale[name], _magnitude(x))
    change = delta - delta_of_rounded_o
    exact.d_lse = d_lse + (change.T if case.packed else change)
    for name, x in results(exact, oracle).items():
        errors[name] = tuple(map(max, errors[name], _errors(x, reference[name])))
    return Expected(reference, errors, scale, {name: x.dtype for name, x in standard.items()})


def errors_and_scale(standard: Results, reference: Results) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    errors = {name: _errors(x, reference[name]) for name, x in standard.items()}
    scale = {name: _magnitude(x) for name, x in reference.items()}
    scale["lse"] = max(scale["lse"], 1.0)  # a logarithm: rounding its argument is an absolute error
    return errors, scale


def _magnitude(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def assert_correct(got: Results, case: Case, device: str = "cpu") -> None:
    """Raises AssertionError with one line for each tensor that fails. Got: everything, or o and lse."""
    want = expected(case, device)
    assert got.keys() in (want.reference.keys(), {"o", "lse"})
    others = functools.partial(_other_seeds, case, device)
    assert_all_correct(got, want, others, case.id, exact=case.dtype == "f64")


def assert_all_correct(
    got: Results, want: Expected, others: Callable[[], list[Expected]], words: str, *, exact: bool
) -> None:
    """others: the case and its twins, where few rows are held to the largest error of many. exact: of float64."""
    complaints = [complaint for name in got if (complaint := _complaint(name, got[name], want, others, exact))]
    assert not complaints, "\n".join([words, *complaints])


def _complaint(name: str, x: Tensor, want: Expected, others: Callable[[], list[Expected]], exact: bool) -> str | None:
    reference, dtype = want.reference[name], want.dtype[name]
    if x.shape != reference.shape or x.dtype != dtype:
        return f"{name}: {x.dtype} {tuple(x.shape)}, expected {dtype} {tuple(reference.shape)}"
    x = x.to(torch.float64)
    if x.isnan().any():
        return f"{name}: {x.isnan().sum()} of {x.numel()} are NaN, the first at {_where(x.isnan())}"
    misplaced = (x.isinf() | reference.isinf()) & (x != reference)
    if misplaced.any():
        at = _where(misplaced)
        return f"{name}: infinities differ in {misplaced.sum()} places, at {at}: got {x[at]}, expected {reference[at]}"
    rules = {"max": _MAX_FLOAT64, "mean": _MEAN_FLOAT64} if exact else {"max": _MAX, "mean": _MEAN}
    errors = dict(zip(rules, _errors(x, reference), strict=True))
    if _independent(x) < _VERY_FEW:
        del rules["mean"]

    def broken(standard_errors: tuple[float, float], scale: float) -> str | None:
        for (rule, (factor, floor)), of_standard in zip(rules.items(), standard_errors, strict=False):
            limit = factor * of_standard + floor * scale
            if errors[rule] > limit:
                difference = (x - reference).abs().nan_to_num(0)
                at = _where(difference == difference.max())
                return (
                    f"{name}: {rule} error {errors[rule]:.3e} > {limit:.3e} (standard {of_standard:.3e}, "
                    f"scale {scale:.3e}), worst at {at}: got {x[at]:.9g}, expected {reference[at]:.9g}"
                )
        return None

    complaint = broken(want.standard_errors[name], want.scale[name])
    if complaint and _independent(x) < _FEW:
        draws = others()
        of_standard = tuple(map(max, zip(*(draw.standard_errors[name] for draw in draws), strict=True)))
        complaint = broken(of_standard, max(draw.scale[name] for draw in draws))
    return complaint


def _errors(x: Tensor, reference: Tensor) -> tuple[float, float]:
    """Largest and mean error, where both are finite: what `standard` overflowed grants nothing."""
    error = (x.to(torch.float64) - reference).abs()
    error = error[error.isfinite()]
    return (error.max().item(), error.mean().item()) if error.numel() else (0.0, 0.0)


@functools.lru_cache(maxsize=1)
def _other_seeds(case: Case, device: str) -> list[Expected]:
    """The case itself and its twins."""
    return [expected.__wrapped__(twin, device) for twin in twins(case)]


def twins(case: Any) -> list[Any]:
    """The case itself, and with other seeds."""
    return [dataclasses.replace(case, seed=case.seed + n) for n in range(_DRAWS + 1)]


def _independent(x: Tensor) -> int:
    """How many errors a tensor holds that are not one and the same: those of a row share its delta."""
    return x.shape[:-1].numel() if x.dim() >= 3 else x.numel()


def _where(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
