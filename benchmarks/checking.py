"""A result is checked before it is timed: its error against the float64 oracle, and how much error is allowed.

Allowed is what the tests allow a maximum: 2 x the error of PyTorch's unfused attention in the inputs' dtype + 1e-5 x
the largest value. The oracle stores the score matrix in float64, so a long problem is checked on a part: the last
batch entry, its last heads and last query rows, with every key, as many as make MAX_SCORES scores (of packed sequences
always the last one, and with dropout every row, because its bits count them from the first). The gradients of such a
part are had from the whole kernel by a d_o that is zero elsewhere.

A peer that draws dropout bits of its own has another expected result on every run. It is held against the oracle
without dropout: it must be off by what dropping moves the oracle, in the mean, within a factor of 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attention.reference import reference_attention, standard_attention
from tests.cases import Inputs

from .call import Call
from .problem import Problem, options

MAX_SCORES = {"cpu": 2**22, "cuda": 2**27}
HOPELESS = 100.0  # times the allowed error: not rounding, another function


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


class _Part:
    """What is checked of a problem: the last of its sequences, heads and query rows."""

    def __init__(self, problem: Problem) -> None:
        case = problem.case
        group = case.heads_q // problem.heads_kv
        seqlen_q, seqlen_k = problem.sequences[-1] if problem.sequences else (0, 0)
        batch, heads_kv, rows = len(problem.sequences), problem.heads_kv, seqlen_q
        budget = MAX_SCORES[torch.device(problem.device).type]
        has_padding = not case.packed and (case.lengths_q or case.lengths_k)  # checked whole
        if case.packed or (batch * case.heads_q * seqlen_q * seqlen_k > budget and not has_padding):
            batch = 1
            heads_kv = min(heads_kv, max(1, budget // (group * seqlen_q * seqlen_k)))
            while problem.heads_kv % heads_kv:
                heads_kv -= 1
            if not case.dropout_p:
                rows = min(rows, max(1, budget // (heads_kv * group * seqlen_k)))
        self._packed_lengths = {"q": seqlen_q, "k": seqlen_k} if case.packed else None
        self._batch, self._rows = slice(-batch, None), slice(-rows, None)
        self._heads_q, self._heads_kv = slice(-heads_kv * group, None), slice(-heads_kv, None)
        # The part's place among parts of its size: dropout counts heads through the batch.
        self.number = len(problem.sequences) * problem.heads_kv // (batch * heads_kv) - 1 if batch else 0

    def of(self, name: str, x: Tensor) -> Tensor:
        """A view of the whole call's tensor of this name."""
        match name:
            case "q" | "o":
                return self._in_batch(x, "q")[self._batch, self._heads_q, self._rows]
            case "k" | "v":
                return self._in_batch(x, "k")[self._batch, self._heads_kv]
            case "bias":
                x = x[(None,) * (4 - x.dim())]
                at = zip(x.shape, (self._batch, self._heads_q, self._rows), strict=False)
                return x[tuple(slice(None) if size == 1 else part for size, part in at)]
            case "alibi_slopes":
                return x[self._heads_q] if x.dim() == 1 else x[self._batch, self._heads_q]
            case "sinks":
                return x[self._heads_q]
        return x

    def _in_batch(self, x: Tensor, axis: str) -> Tensor:
        """As (B, H, L, D), which the last of packed sequences is made to be."""
        if self._packed_lengths is None:
            return x
        return x[x.shape[0] - self._packed_lengths[axis] :].transpose(0, 1)[None]


class Oracle:
    """The expected results of one problem, for any number of implementations."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self._part = _Part(problem)
        self._names = ("q", "k", "v", *problem.extra_gradients) if problem.needs_grad else ("o",)
        self._d_o = torch.zeros_like(inputs.d_o)
        d_o = self._part.of("o", self._d_o).copy_(self._part.of("o", inputs.d_o))

        whole = dict(zip("qkv", inputs.args, strict=False)) | options(inputs)
        kept = {
            name: self._part.of(name, x.detach()).requires_grad_(name in self._names) if isinstance(x, Tensor) else x
            for name, x in whole.items()
            if not name.startswith(("cu_seqlens", "max_seqlen"))
        }
        if problem.case.dropout_p:
            kept["first_batch"] = self._part.number

        def results(attention: Callable[..., Any], **changed: Any) -> tuple[Tensor, ...]:
            o = attention(**kept | changed)
            if not problem.needs_grad:
                return (o,)
            return torch.autograd.grad(o, [kept[name] for name in self._names], d_o.to(o.dtype))

        def reference(**kwargs: Any) -> Tensor:
            return reference_attention(**kwargs)[0]

        self._expected = results(reference)
        self._allowed = [
            2 * _largest(x.double() - y) + 1e-5 * _largest(y)
            for x, y in zip(results(standard_attention), self._expected, strict=True)
        ]
        if problem.case.dropout_p:
            self._undropped = results(reference, dropout_p=0.0)
        else:
            self._undropped = None

    def check(self, call: Call) -> Verdict:
        """Runs the call once."""
        d_o, call.d_o = call.d_o, self._d_o
        try:
            with call.context():
                results = call()
        finally:
            call.d_o = d_o
        found = [self._part.of(name, x.detach()) for name, x in zip(self._names, results, strict=True)]
        if self._undropped and call.implementation.draws_own_bits:
            return self._check_what_dropping_moves(found)
        errors = [_largest(x.double() - expected) for x, expected in zip(found, self._expected, strict=True)]
        ratios = [
            error / allowed if allowed else float(error > 0)
            for error, allowed in zip(errors, self._allowed, strict=True)
        ]
        return Verdict(_worst(errors), _worst(ratios))

    def _check_what_dropping_moves(self, found: list[Tensor]) -> Verdict:
        ratios = []
        for x, expected, undropped in zip(found, self._expected, self._undropped, strict=True):
            moved = ((x.double() - undropped).abs().mean() / (expected - undropped).abs().mean()).item()
            ratios.append(max(moved, 1 / moved) / 2 if moved else math.inf)
        return Verdict(math.nan, _worst(ratios))


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _worst(values: list[float]) -> float:
    """The maximum; NaN if any is NaN."""
    return torch.tensor(values).max().item()
