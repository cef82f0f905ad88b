"""A result is checked before it is timed: its error against the float64 oracle, and how much error is allowed.

Allowed is what the tests allow a maximum: 2 x the error of PyTorch's unfused attention in the inputs' dtype + 1e-5 x
the largest value. The oracle stores the score matrix in float64, so a long problem is checked on a part: the last
batch entry, its last heads and last query rows, with every key, as many as make MAX_SCORES scores. The gradients of
such a part are had from the whole kernel by a d_o that is zero elsewhere.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flash_attention.reference import reference_attention, standard_attention
from tests.cases import Inputs

from .call import Call
from .problem import Problem, options

MAX_SCORES = {"cpu": 2**22, "cuda": 2**27}
HOPELESS = 100.0  # times the allowed error: not rounding, another function
_PER_HEAD = ("bias", "alibi_slopes", "sinks", "seqlens_q", "seqlens_k", "seed")  # options that a part cannot share


@dataclasses.dataclass(frozen=True)
class Verdict:
    error: float  # max |x - reference|
    ratio: float  # the largest error / allowed error of the results

    @property
    def status(self) -> str:
        if self.ratio <= 1:
            return "ok"
        return f"{'wrong' if self.is_wrong else 'inaccurate'}: error {self.error:.2e} is {self.ratio:.3g}x the allowed"

    @property
    def is_wrong(self) -> bool:
        return not self.ratio <= HOPELESS  # NaN is wrong


class Oracle:
    """The expected results of one problem, for any number of implementations."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        case = problem.case
        group = case.heads_q // problem.heads_kv
        kept = options(inputs)
        budget = MAX_SCORES[torch.device(problem.device).type]
        if case.batch * case.heads_q * case.seqlen_q * case.seqlen_k <= budget or any(
            name in kept for name in _PER_HEAD
        ):
            batch, heads_kv, rows = case.batch, problem.heads_kv, case.seqlen_q
        else:
            batch = 1
            heads_kv = min(problem.heads_kv, max(1, budget // (group * case.seqlen_q * case.seqlen_k)))
            rows = min(case.seqlen_q, max(1, budget // (heads_kv * group * case.seqlen_k)))
        of_q = (
            slice(case.batch - batch, None),
            slice((problem.heads_kv - heads_kv) * group, None),
            slice(case.seqlen_q - rows, None),
        )
        of_kv = (of_q[0], slice(problem.heads_kv - heads_kv, None))
        self._parts = (of_q, of_kv, of_kv) if problem.needs_grad else (of_q,)
        self._d_o = torch.zeros_like(inputs.d_o)
        self._d_o[of_q] = inputs.d_o[of_q]

        q, k, v = inputs.args
        part = [
            x.detach()[at].requires_grad_(problem.needs_grad)
            for x, at in zip((q, k, v), (of_q, of_kv, of_kv), strict=True)
        ]
        expected = self._results(part, reference_attention(*part, **kept)[0], inputs.d_o[of_q])
        standard = self._results(part, standard_attention(*part, **kept), inputs.d_o[of_q])
        self._expected = expected
        self._allowed = [
            2 * _largest(x.double() - y) + 1e-5 * _largest(y) for x, y in zip(standard, expected, strict=True)
        ]

    def _results(self, qkv: list[Tensor], o: Tensor, d_o: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, qkv, d_o.to(o.dtype)) if qkv[0].requires_grad else (o,)

    def check(self, call: Call) -> Verdict:
        """Runs the call once."""
        d_o, call.d_o = call.d_o, self._d_o
        try:
            with call.context():
                results = call()
        finally:
            call.d_o = d_o
        errors = [
            _largest(result[at].double() - expected)
            for result, at, expected in zip(results, self._parts, self._expected, strict=True)
        ]
        ratios = [
            error / allowed if allowed else float(error > 0)
            for error, allowed in zip(errors, self._allowed, strict=True)
        ]
        return Verdict(_worst(errors), _worst(ratios))


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _worst(values: list[float]) -> float:
    """The maximum; NaN if any is NaN."""
    return torch.tensor(values).max().item()
