"""What is asked of an implementation: a case of the test table's kind, a pass, a device; and what it costs on paper."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tests.cases import DTYPES, Case, Inputs

DTYPE_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}  # "float32" -> "f32"

_PLAIN = Case()
_SIZES = (
    "dtype",
    "head_dim",
    "head_dim_v",
    "batch",
    "heads_q",
    "heads_kv",
    "seqlen_q",
    "seqlen_k",
    "causal",
    "window",
    "softmax_scale",
    "softcap",
    "seed",
)

# The backward recomputes the scores: five products where the forward has two.
PASS_COST = {"fwd": 1.0, "decode": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One case, one pass ("fwd", "bwd", "fwd+bwd", or "decode", a forward of one query), one device."""

    case: Case
    direction: str = "fwd"
    device: str = "cpu"

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
    def visible_pairs(self) -> int:
        """Query-key pairs of one head that the causal mask and the window leave."""
        case = self.case
        left, right = case.window
        center = torch.arange(case.seqlen_q) + (case.seqlen_k - case.seqlen_q)
        right = 0 if case.causal else right
        last = center + right if right >= 0 else torch.full_like(center, case.seqlen_k - 1)
        first = center - left if left >= 0 else torch.zeros_like(center)
        return int((last.clamp(max=case.seqlen_k - 1) - first.clamp(min=0) + 1).clamp(min=0).sum())

    @property
    def flops(self) -> float:
        """4 B Hq D (visible pairs) for the forward, 2.5 times that for the backward."""
        return PASS_COST[self.direction] * 2 * self.case.batch * self.case.heads_q * self.head_dims * self.visible_pairs

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V."""
        return self.case.batch * self.heads_kv * self.case.seqlen_k * self.head_dims * self.dtype.itemsize

    @property
    def scores_bytes(self) -> int:
        """Bytes of one B x Hq x Lq x Lk matrix in the inputs' dtype."""
        return self.case.batch * self.case.heads_q * self.case.seqlen_q * self.case.seqlen_k * self.dtype.itemsize

    @property
    def inputs_bytes(self) -> int:
        """Bytes of q, k, v and, where there is a backward, d_o."""
        case = self.case
        per_query = case.head_dim + self.needs_grad * (case.head_dim_v or case.head_dim)
        return case.batch * case.heads_q * case.seqlen_q * per_query * self.dtype.itemsize + self.kv_bytes

    def inputs(self) -> Inputs:
        """The case's inputs. Plain ones, which may be long, are drawn on the device and in the dtype; equal
        problems have equal inputs."""
        case = self.case
        if case != dataclasses.replace(_PLAIN, **{name: getattr(case, name) for name in _SIZES}):
            return case.inputs(self.device)
        inputs = dataclasses.replace(case, batch=1, seqlen_q=1, seqlen_k=1).inputs(self.device)
        random = torch.Generator(self.device).manual_seed(case.seed)
        dim_v = case.head_dim_v or case.head_dim
        of_q, of_k = (case.heads_q, case.seqlen_q), (self.heads_kv, case.seqlen_k)
        shapes = ((*of_q, case.head_dim), (*of_k, case.head_dim), (*of_k, dim_v), (*of_q, dim_v))
        *qkv, inputs.d_o = (
            torch.randn(case.batch, *shape, generator=random, dtype=self.dtype, device=self.device) for shape in shapes
        )
        inputs.args = tuple(x.requires_grad_() for x in qkv)
        return inputs

    def columns(self) -> dict[str, Any]:
        """The shape, as CSV columns."""
        case = self.case
        return {
            "pass": self.direction,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": case.batch,
            "heads_q": case.heads_q,
            "heads_kv": self.heads_kv,
            "seqlen_q": case.seqlen_q,
            "seqlen_k": case.seqlen_k,
            "head_dim": case.head_dim,
            "causal": case.causal,
        }


def options(inputs: Inputs) -> dict[str, Any]:
    """The options of a call that differ from their defaults, so that a peer is asked only for what it must do."""
    plain = {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "softmax_scale": None, "dropout_p": 0.0}
    return {name: value for name, value in inputs.options.items() if name not in plain or value != plain[name]}
