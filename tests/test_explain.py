"""explain() names every kernel of the build, the one chosen, and why not the others."""

import pytest
import torch

from flash_attention import _C, KernelVerdict, explain, flash_attention

Q, K, V = torch.randn(1, 4, 30, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 24)


@pytest.mark.parametrize("backward", [False, True])
def test_there_is_one_verdict_for_each_kernel_of_the_build(backward: bool) -> None:
    rows = explain(Q, K, V, causal=True, backward=backward)
    assert all(isinstance(row, KernelVerdict) for row in rows)
    assert [(row.impl, row.device) for row in rows] == _C.kernels()
    assert {"reference", "naive", "fused"} <= {row.impl for row in rows if row.device == "cpu"}
    assert all(isinstance(row.verdict, str) and row.verdict for row in rows)


@pytest.mark.parametrize("backward", [False, True])
def test_auto_chooses_one_kernel_and_calls_the_others_slower_or_says_why(backward: bool) -> None:
    rows = explain(Q, K, V, bias=torch.zeros(30, 40), dropout_p=0.5, sinks=torch.zeros(4), backward=backward)
    assert [row.impl for row in rows if row.verdict == "chosen"] == ["fused"]
    assert [row.impl for row in rows if row.verdict == "slower"] == ["naive", "reference"]
    assert all("runs on cuda" in row.verdict for row in rows if row.device == "cuda")


@pytest.mark.parametrize("impl", ["reference", "naive", "fused"])
def test_a_named_kernel_is_chosen(impl: str) -> None:
    chosen = [row.impl for row in explain(Q, K, V, impl=impl) if row.verdict == "chosen"]
    assert chosen == [impl]


def test_explaining_computes_and_changes_nothing() -> None:
    state = torch.get_rng_state()
    long = torch.zeros(1, 1, 1, 128).expand(1, 8, 2**24, 128)  # a petabyte of scores
    explain(long, long, long, impl="fused")
    assert torch.equal(torch.get_rng_state(), state)


def test_packed_sequences_are_explained() -> None:
    q = torch.randn(30, 2, 16)
    ends = torch.tensor([0, 10, 30], dtype=torch.int32)
    options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 20, "max_seqlen_k": 20}
    assert explain(q, q, q, **options)[0].verdict == "chosen"


def test_a_kernel_that_is_not_chosen_gives_the_same_answer() -> None:
    expected = flash_attention(Q, K, V, causal=True)
    for row in explain(Q, K, V, causal=True):
        if row.verdict == "slower":
            torch.testing.assert_close(flash_attention(Q, K, V, causal=True, impl=row.impl), expected)
