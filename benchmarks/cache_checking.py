"""Attention over a cache is checked as checking.py checks attention: the same rule, on parts of a large problem.

A part is some heads of one sequence, as many as the oracle's float64 copies of their keys allow; of all the parts a few
are checked, spread evenly over batch and heads, the first and the last among them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flash_attention.reference_kvcache import reference_attention_with_kvcache

from .cache_problem import CacheCall, CacheProblem
from .checking import Verdict

_MOST_PARTS = 8
_PART_SIZE = {"cpu": 2**22, "cuda": 2**27}  # elements of the keys, repeated for every query head


@dataclasses.dataclass(frozen=True)
class _Part:
    sequence: slice
    heads_q: slice
    heads_kv: slice

    def of(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call that computes this part."""
        of_cache = (slice(None) if "page_table" in inputs else self.sequence, self.heads_kv)
        of_new = (self.sequence, self.heads_kv)
        places = {"q": (self.sequence, self.heads_q), "k_cache": of_cache, "v_cache": of_cache}
        places |= {"k": of_new, "v": of_new, "cache_seqlens": self.sequence, "page_table": self.sequence}
        return {name: x[places[name]] if name in places else x for name, x in inputs.items()}


def _parts(problem: CacheProblem) -> list[_Part]:
    case = problem.case
    group = case.heads_q // case.heads_kv
    fitting = _PART_SIZE[torch.device(problem.device).type] // (group * case.longest * case.head_dim)
    heads = max(n for n in range(1, case.heads_kv + 1) if case.heads_kv % n == 0 and n <= max(1, fitting))
    parts = [
        _Part(slice(b, b + 1), slice(h * group, (h + heads) * group), slice(h, h + heads))
        for b in range(case.batch)
        for h in range(0, case.heads_kv, heads)
    ]
    places = torch.linspace(0, len(parts) - 1, min(len(parts), _MOST_PARTS)).round()
    return [parts[int(place)] for place in places]


class CacheOracle:
    """The expected o of one problem, for any number of implementations."""

    def __init__(self, problem: CacheProblem, inputs: dict[str, Any]) -> None:
        self._parts = _parts(problem)
        self._expected = self._reference(inputs, torch.float64)
        rounded = self._reference(inputs, inputs["q"].dtype)
        self._allowed = (2 * (rounded.double() - self._expected).abs().max() + 1e-5 * self._expected.abs().max()).item()

    def _reference(self, inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
        return torch.cat([reference_attention_with_kvcache(**part.of(inputs), dtype=dtype)[0] for part in self._parts])

    def check(self, call: CacheCall) -> Verdict:
        """Runs the call once."""
        with call.context():
            o = call()
        found = torch.cat([o[part.sequence, part.heads_q] for part in self._parts])
        error = (found.double() - self._expected).abs().max().item()
        return Verdict(error, error / self._allowed)
