"""What is asked of an implementation: a case of the test table's kind, a pass, a device; and what it costs on paper."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from tests.cases import DTYPES, Case, Inputs

DTYPE_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}  # "float32" -> "f32"

# The backward recomputes the scores: five products where the forward has two.
PASS_COST = {"fwd": 1.0, "decode": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One case, one pass ("fwd", "bwd", "fwd+bwd", or "decode", a forward of one query), one device."""

    case: Case
    direction: str = "fwd"
    device: str = "cpu"
    extra_gradients: tuple[str, ...] = ()  # options that the backward differentiates beside q, k and v

    @property
    def id(self) -> str:
        return f"{self.direction} {self.case.id}"

    @property
    def heads_kv(self) -> int:
        return self.case.heads_kv or self.case.heads_q

    @property
    def head_dims(self) -> int:
        """D + Dv."""
        return self.case.head_dim + (self.case.head_dim_v or self.case.head_dim)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.case.dtype]

    @property
    def needs_grad(self) -> bool:
        return "bwd" in self.direction

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(Lq, Lk) of each sequence, padding included."""
        case = self.case
        if case.packed:
            return list(zip(case.lengths_q, case.lengths_k, strict=True))
        return [(case.seqlen_q, case.seqlen_k)] * case.batch

    @property
    def visible_pairs(self) -> int:
        """Query-key pairs that the causal mask and the window leave, of one head in all sequences together."""
        return sum(count * self._visible_pairs(*lengths) for lengths, count in Counter(self.sequences).items())

    def _visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        left, right = self.case.window
        center = torch.arange(seqlen_q) + (seqlen_k - seqlen_q)
        right = 0 if self.case.causal else right
        last = center + right if right >= 0 else torch.full_like(center, seqlen_k - 1)
        first = center - left if left >= 0 else torch.zeros_like(center)
        return int((last.clamp(max=seqlen_k - 1) - first.clamp(min=0) + 1).clamp(min=0).sum())

    @property
    def flops(self) -> float:
        """4 Hq D (visible pairs) for the forward, 2.5 times that for the backward."""
        return PASS_COST[self.direction] * 2 * self.case.heads_q * self.head_dims * self.visible_pairs

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V."""
        return sum(k for _, k in self.sequences) * self.heads_kv * self.head_dims * self.dtype.itemsize

    @property
    def scores_bytes(self) -> int:
        """Bytes of one B x Hq x Lq x Lk matrix in the inputs' dtype."""
        return sum(q * k for q, k in self.sequences) * self.case.heads_q * self.dtype.itemsize

    @property
    def inputs_bytes(self) -> int:
        """Bytes of q, k, v and, where there is a backward, d_o."""
        case = self.case
        per_query = case.head_dim + self.needs_grad * (case.head_dim_v or case.head_dim)
        return sum(q for q, _ in self.sequences) * case.heads_q * per_query * self.dtype.itemsize + self.kv_bytes

    def inputs(self) -> Inputs:
        """The case's inputs, which may be long: drawn on the device. Equal problems have equal ones."""
        return self.case.inputs(self.device, drawn_there=True)

    def columns(self) -> dict[str, Any]:
        """The shape, as CSV columns."""
        case = self.case
        return {
            "pass": self.direction,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": len(self.sequences),
            "heads_q": case.heads_q,
            "heads_kv": self.heads_kv,
            "seqlen_q": max((q for q, _ in self.sequences), default=0),
            "seqlen_k": max((k for _, k in self.sequences), default=0),
            "head_dim": case.head_dim,
            "causal": case.causal,
        }


def options(inputs: Inputs) -> dict[str, Any]:
    """The options of a call that differ from their defaults, so that a peer is asked only for what it must do; of
    packed sequences also the lengths."""
    plain = {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "softmax_scale": None, "dropout_p": 0.0}
    asked = {name: value for name, value in inputs.options.items() if name not in plain or value != plain[name]}
    lengths = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), inputs.args[3:], strict=False))  # none unless packed
    return asked | lengths | inputs.max_seqlens


def renamed(asked: dict[str, Any], known: dict[str, str], who: str) -> dict[str, Any]:
    """The options in a peer's words; NotImplementedError for one that it has no word for. A seed is dropped: peers draw
    bits of their own."""
    if unknown := asked.keys() - known - {"seed"}:
        raise NotImplementedError(f"{who} has no {', '.join(sorted(unknown))}")
    return {known[name]: value for name, value in asked.items() if name != "seed"}
