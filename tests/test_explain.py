"""explain() names every kernel of the build, the one chosen, and why not the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention import _C, KernelVerdict, explain, flash_attention, workspace_bytes

from .checks import FORWARD_ONLY
from .conftest import each_kernel


def qkv(device: str) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, device=device) for shape in ((1, 4, 30, 16), (1, 2, 40, 16), (1, 2, 40, 24)))


@pytest.mark.parametrize("backward", [False, True])
def test_there_is_one_verdict_for_each_kernel_of_the_build(backward: bool, device: str) -> None:
    rows = explain(*qkv(device), causal=True, backward=backward)
    assert all(isinstance(row, KernelVerdict) for row in rows)
    assert [(row.impl, row.device) for row in rows] == _C.kernels()
    expected = {"cpu": {"reference", "naive", "fused"}, "cuda": {"naive", "split", "fused"}}[device]
    assert {row.impl for row in rows if row.device == device} >= expected
    assert all(isinstance(row.verdict, str) and row.verdict for row in rows)


@pytest.mark.parametrize("backward", [False, True])
def test_auto_chooses_one_kernel_and_calls_the_others_slower_or_says_why(backward: bool, device: str) -> None:
    extras = {"bias": torch.zeros(30, 40, device=device), "sinks": torch.zeros(4, device=device)}
    rows = explain(*qkv(device), **extras, dropout_p=0.5, backward=backward)
    verdicts = {row.impl: row.verdict for row in rows if row.device == device}
    refusing = {impl: verdicts.pop(impl) for impl in FORWARD_ONLY if backward and impl in verdicts}
    assert all("has no backward" in verdict for verdict in refusing.values())
    assert next(iter(verdicts)) == "fused"
    assert list(verdicts.values()) == ["chosen"] + ["slower"] * (len(verdicts) - 1)
    elsewhere = [row for row in rows if row.device != device]
    assert all(f"runs on {row.device}, the tensors are on {device}" in row.verdict for row in elsewhere)


@each_kernel("auto")
def test_a_named_kernel_is_chosen(device: str, impl: str) -> None:
    rows = explain(*qkv(device), impl=impl)
    assert [(row.impl, row.device) for row in rows if row.verdict == "chosen"] == [(impl, device)]


def test_explaining_computes_and_changes_nothing(device: str) -> None:
    rng_state = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    state = rng_state()
    long = torch.zeros(1, 1, 1, 128, device=device).expand(1, 8, 2**24, 128)  # a petabyte of scores
    for seed in ({}, {"seed": None}):
        explain(long, long, long, impl="fused", dropout_p=0.5, **seed)
        workspace_bytes(long, long, long, impl="fused", dropout_p=0.5, **seed)
    assert torch.equal(rng_state(), state)


def test_packed_sequences_are_explained(device: str) -> None:
    q = torch.randn(30, 2, 16, device=device)
    ends = torch.tensor([0, 10, 30], dtype=torch.int32, device=device)
    options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 20, "max_seqlen_k": 20}
    assert [row.verdict for row in explain(q, q, q, **options) if row.device == device][0] == "chosen"


def test_a_kernel_that_is_not_chosen_gives_the_same_answer(device: str) -> None:
    q, k, v = qkv(device)
    expected = flash_attention(q, k, v, causal=True)
    for row in explain(q, k, v, causal=True):
        if row.verdict == "slower":
            torch.testing.assert_close(flash_attention(q, k, v, causal=True, impl=row.impl), expected)


# What replaces good arguments, made on a device.
BAD: dict[str, Callable[[str], dict[str, Any]]] = {
    "rank": lambda device: {"q": torch.ones(4, 30, 16, device=device)},
    "heads": lambda device: {"q": torch.ones(1, 3, 30, 16, device=device)},
    "head_dim of k": lambda device: {"k": torch.ones(1, 2, 40, 8, device=device)},
    "head_dim_v": lambda device: {"v": torch.ones(1, 2, 40, 513, device=device)},
    "dtypes": lambda device: {"k": torch.ones(1, 2, 40, 16, device=device).half()},
    "integers": lambda device: {name: torch.ones(1, 2, 40, 16, device=device).int() for name in "qkv"},
    "last axis": lambda device: {"q": torch.ones(1, 4, 16, 30, device=device).mT},
    "scale": lambda device: {"softmax_scale": float("nan")},
    "softcap": lambda device: {"softcap": 1e39},
    "window": lambda device: {"window_size": (-2, 0)},
    "dropout_p": lambda device: {"dropout_p": 1.0},
    "seed": lambda device: {"dropout_p": 0.5, "seed": torch.ones(2, device=device).long()},
    "bias shape": lambda device: {"bias": torch.ones(3, 40, device=device)},
    "bias dtype": lambda device: {"bias": torch.ones(30, 40, device=device).double()},
    "slopes": lambda device: {"alibi_slopes": torch.ones(3, device=device)},
    "sinks": lambda device: {"sinks": torch.ones(4, device=device).half()},
    "lengths": lambda device: {"seqlens_k": torch.ones(1, device=device).long()},
    "count of lengths": lambda device: {"seqlens_k": torch.ones(2, device=device).int()},
    "unknown impl": lambda device: {"impl": "best"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("call", [flash_attention, explain, workspace_bytes], ids=lambda call: call.__name__)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_on_the_gpu_as_on_the_cpu(name: str, call: Callable[..., Any]) -> None:
    errors = []
    for device in ("cpu", "cuda"):
        with pytest.raises((ValueError, TypeError)) as caught:
            call(**dict(zip("qkv", qkv(device), strict=True)) | BAD[name](device))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
