"""explain() names every kernel of the build, the one chosen, and why not the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention import _C, KernelVerdict, explain, flash_attention, workspace_bytes

from .checks import FORWARD_ONLY, promises
from .conftest import IMPLS, each_kernel_and_dtype, near


def qkv(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = ((1, 4, 30, 16), (1, 2, 40, 16), (1, 2, 40, 24))
    return tuple(torch.randn(shape, dtype=dtype, device=device) for shape in shapes)


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)


@pytest.mark.parametrize("backward", [False, True])
def test_there_is_one_verdict_for_each_kernel_of_the_build(backward: bool, device: str) -> None:
    rows = explain(*qkv(device), causal=True, backward=backward)
    assert all(isinstance(row, KernelVerdict) for row in rows)
    assert [(row.impl, row.device) for row in rows] == _C.kernels()
    expected = {"cpu": {"reference", "naive", "fused"}, "cuda": {"naive", "split", "fused", "tensor_core"}}[device]
    assert {row.impl for row in rows if row.device == device} >= expected
    assert all(isinstance(row.verdict, str) and row.verdict for row in rows)


def test_few_kernels_have_no_backward() -> None:
    assert FORWARD_ONLY <= {"split", "tensor_core"}


@each_dtype
@pytest.mark.parametrize("backward", [False, True])
def test_auto_chooses_one_kernel_and_calls_the_others_slower_or_says_why(
    backward: bool, dtype: torch.dtype, device: str
) -> None:
    extras = {"bias": torch.zeros(30, 40, dtype=dtype, device=device), "sinks": torch.zeros(4, device=device)}
    rows = explain(*qkv(device, dtype), **extras, dropout_p=0.5, backward=backward)
    verdicts = {row.impl: row.verdict for row in rows if row.device == device}
    by_name_alone = [("tensor_core", torch.float32)]
    for impl in [impl for impl in verdicts if not promises(impl, dtype) or (impl, dtype) in by_name_alone]:
        assert str(dtype).removeprefix("torch.") in verdicts.pop(impl)
    for impl in FORWARD_ONLY & verdicts.keys() if backward else ():
        assert verdicts.pop(impl) == "has no backward"
    fastest = "fused" if "tensor_core" not in verdicts else "tensor_core"
    assert next(iter(verdicts)) == fastest
    assert list(verdicts.values()) == ["chosen"] + ["slower"] * (len(verdicts) - 1)
    elsewhere = [row for row in rows if row.device != device]
    assert all(f"runs on {row.device}, the tensors are on {device}" in row.verdict for row in elsewhere)


@each_kernel_and_dtype("auto")
def test_a_named_kernel_is_chosen(device: str, impl: str, dtype: torch.dtype) -> None:
    rows = explain(*qkv(device, dtype), impl=impl)
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
    assert [row.verdict for row in explain(q, q, q, **options) if row.device == device].count("chosen") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_kernel_that_is_not_chosen_gives_the_same_answer(dtype: torch.dtype, device: str) -> None:
    q, k, v = qkv(device, dtype)
    expected = flash_attention(q, k, v, causal=True)
    for row in explain(q, k, v, causal=True):
        if row.verdict == "slower":
            got = flash_attention(q, k, v, causal=True, impl=row.impl)
            torch.testing.assert_close(got, expected, **near(dtype, 8))


def rows_apart(x: Tensor, gap: int) -> Tensor:
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + gap)[..., : x.shape[-1]]


# What makes tensor cores refuse a call that they would serve, and the reasons; addresses and strides in bfloat16.
ROWS = "takes rows of whole 16 bytes, aligned to them (head_dim, strides and addresses)"
BFLOAT16 = torch.bfloat16
REFUSED: dict[str, tuple[Callable[..., tuple[Tensor, ...]], list[str]]] = {
    "float64": (lambda q, k, v: (q.double(), k.double(), v.double()), ["not float64"]),
    "wide q and k": (
        lambda q, k, v: (q.new_zeros(1, 4, 30, 264), k.new_zeros(1, 2, 40, 264), v),
        ["up to 256 in bfloat16, not 264"],
    ),
    "wide v": (lambda q, k, v: (q, k, v.new_zeros(1, 2, 40, 512)), ["up to 256 in bfloat16, not 512"]),
    "narrow q and k": (lambda q, k, v: (q[..., :12], k[..., :12], v), [ROWS]),
    "odd v": (lambda q, k, v: (q, k, v[..., :7]), [ROWS]),
    "rows of q apart": (lambda q, k, v: (rows_apart(q, 4), k, v), [ROWS]),
    "rows of k apart": (lambda q, k, v: (q, rows_apart(k, 1), v), [ROWS]),
    "address of q": (lambda q, k, v: (rows_apart(q, 8)[..., 4:12], k[..., :8], v), [ROWS]),
    "address of v": (lambda q, k, v: (q, k, rows_apart(v, 8)[..., 1:17]), [ROWS]),
    "everything": (
        lambda q, k, v: (q.new_zeros(1, 4, 30, 300).double(), k.new_zeros(1, 2, 40, 300).double(), v.double()[..., :7]),
        ["not float64", "up to 256 in float64, not 300", ROWS],
    ),
}


@pytest.mark.skipif("tensor_core" not in IMPLS["cuda"], reason="this build has no tensor_core")
@pytest.mark.parametrize("name", REFUSED)
def test_tensor_cores_name_every_reason_and_auto_takes_another_kernel(name: str, device: str) -> None:
    change, reasons = REFUSED[name]
    verdicts = [
        {(row.impl, row.device): row.verdict for row in explain(*tensors)}
        for tensors in (qkv(device, BFLOAT16), change(*qkv(device, BFLOAT16)))
    ]
    elsewhere = [] if device == "cuda" else ["runs on cuda, the tensors are on cpu"]
    assert verdicts[0]["tensor_core", "cuda"] == ("; ".join(elsewhere) or "chosen")
    given = verdicts[1]["tensor_core", "cuda"].split("; ")
    assert len(given) == len(elsewhere) + len(reasons)
    assert all(reason in text for reason, text in zip(elsewhere + reasons, given, strict=True)), given
    assert verdicts[1]["fused", device] == "chosen"


@pytest.mark.gpu
def test_an_unaligned_call_by_name_says_why_and_auto_serves_it() -> None:
    q, k, v = qkv("cuda", BFLOAT16)
    moved = rows_apart(k, 1).copy_(k)
    with pytest.raises(ValueError, match="impl 'tensor_core' cannot serve this request: takes rows of whole 16 bytes"):
        flash_attention(q, moved, v, impl="tensor_core")
    assert torch.equal(flash_attention(q, moved, v), flash_attention(q, k, v, impl="fused"))


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
