"""float64 gradients of o and lse agree with finite differences in every differentiable input."""

import pytest
import torch

from flash_attention import flash_attention, flash_attention_varlen

from .cases import Case
from .conftest import each_kernel, skip_unless_served

SMALL = {"dtype": "f64", "head_dim": 3, "head_dim_v": 2, "heads_q": 4, "heads_kv": 2, "seqlen_q": 4, "seqlen_k": 5}
FEATURES = {"softcap": 2.0, "alibi": "bh", "sinks": True}
CASES = (
    Case(**SMALL, causal=True),
    Case(**SMALL, **FEATURES, bias="bhqk", window=(2, 1)),
    Case(**SMALL, **FEATURES, bias="1h1k", causal=True, dropout_p=0.3),
    Case(**SMALL, bias="qk", bias_values="holes", alibi="h", extras_dtype="f64", layout="mixed"),
    Case(**SMALL, **FEATURES, packed=True, lengths_q=(4, 1, 0, 2), lengths_k=(2, 5, 3, 0), causal=True, dropout_p=0.3),
    Case("f64", 33, batch=1, heads_q=1, seqlen_q=9, seqlen_k=17, causal=True, sinks=True),
)


@each_kernel("auto", backward=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradients_agree_with_finite_differences(case: Case, device: str, impl: str) -> None:
    skip_unless_served(impl, case)
    inputs = case.inputs(device)
    names = tuple(inputs.leaves)
    fixed = {name: x for name, x in inputs.options.items() if name not in names}
    function = flash_attention_varlen if case.packed else flash_attention

    def call(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        extras = dict(zip(names[3:], leaves[3:], strict=True))
        positional = (*leaves[:3], *inputs.args[3:])
        o, lse = function(*positional, **inputs.max_seqlens, **extras, **fixed, return_lse=True, impl=impl)
        return o, torch.where(lse.isfinite(), lse, 0)

    leaves = tuple(inputs.leaves.values())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=case.head_dim > 8)
