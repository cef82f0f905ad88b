"""The same inputs give the same bits: on every run, at every number of threads, alone or among other threads."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from .cases import Case
from .checks import run, serves
from .conftest import IMPLS, each_kernel, skip_unless_served

REPEATS = int(os.environ.get("FLASH_ATTENTION_TEST_REPEATS", "20"))

# Large enough that the binding spreads them over threads, and that a GPU has many blocks at work.
CASES = (
    Case("f32", 64, seqlen_q=300, seqlen_k=333, causal=True),
    Case(
        "bf16",
        64,
        heads_q=6,
        heads_kv=2,
        seqlen_q=257,
        seqlen_k=300,
        bias="1h1k",
        alibi="bh",
        sinks=True,
        dropout_p=0.2,
    ),
    Case("f16", 40, 64, heads_q=3, heads_kv=1, lengths_q=(300, 7), lengths_k=(11, 300), seqlen_q=300, seqlen_k=300),
    Case("f64", 32, packed=True, lengths_q=(100, 0, 257, 3), lengths_k=(130, 5, 200, 100), causal=True, alibi="h"),
    Case("f32", 128, batch=1, heads_q=8, heads_kv=1, seqlen_q=1, seqlen_k=3000, sinks=True),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_real_kernel = each_kernel("reference", "auto")
# All multiprocessors of a GPU, many tiles each: for the kernels that share tiles between threads.
LONG = (
    Case("bf16", 128, heads_q=8, heads_kv=2, seqlen_q=1024, seqlen_k=1024, causal=True, dropout_p=0.1, bias="1hqk"),
    Case("f32", 64, heads_q=16, seqlen_q=777, seqlen_k=1500, alibi="h", sinks=True),
    Case("f16", 256, batch=1, heads_q=4, seqlen_q=500, seqlen_k=2000, window=(700, 100), softcap=10.0),
    # Each tile of tensor cores, plain and with modified scores.
    Case("f16", 32, heads_q=32, seqlen_q=1000, seqlen_k=1500, causal=True, sinks=True),
    Case("bf16", 64, heads_q=32, heads_kv=4, seqlen_q=1500, seqlen_k=1000),
    Case("bf16", 96, 72, heads_q=16, seqlen_q=700, seqlen_k=900, causal=True, alibi="bh", dropout_p=0.2),
    Case("f16", 128, heads_q=16, packed=True, lengths_q=(900, 0, 70, 513), lengths_k=(1300, 64, 129, 0), causal=True),
    Case("f16", 192, 128, heads_q=8, heads_kv=2, seqlen_q=700, seqlen_k=1300, window=(300, 64)),
    Case("bf16", 200, heads_q=8, lengths_q=(600, 77), lengths_k=(300, 900), seqlen_q=600, seqlen_k=900, bias="1h1k"),
    Case("bf16", 256, heads_q=8, seqlen_q=600, seqlen_k=1100, causal=True),
)


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ, told by their bits, so that -0 is not 0."""
    return [name for name in one if not torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))]


@pytest.mark.parametrize("impl", ["naive", "fused"])
@each_case
def test_the_number_of_threads_changes_no_bit(case: Case, impl: str, threads: None) -> None:
    results = {}
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results[count] = run(case.inputs(), impl)
    for count in (2, 5):
        assert not same_bits(results[1], results[count]), f"{count} threads"


@each_real_kernel
@each_case
def test_every_run_gives_the_same_bits(case: Case, device: str, impl: str) -> None:
    assert_repeated(case, device, impl, REPEATS)


@pytest.mark.slow
@each_case
def test_two_hundred_runs_give_the_same_bits(case: Case) -> None:
    assert_repeated(case, "cpu", "fused", 200)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("impl", "case"),
    [
        (impl, case)
        for impl in ("naive", "split", "fused", "tensor_core")
        for case in (*CASES, *(LONG[:3] if impl in ("split", "fused") else LONG if impl == "tensor_core" else ()))
        if serves(impl, case)
    ],
    ids=lambda x: getattr(x, "id", x),
)
def test_two_hundred_runs_on_the_gpu_give_the_same_bits(impl: str, case: Case) -> None:
    """Forward and backward of each kernel that has them."""
    assert impl in IMPLS["cuda"]
    assert_repeated(case, "cuda", impl, 200)


def assert_repeated(case: Case, device: str, impl: str, repeats: int) -> None:
    skip_unless_served(impl, case)
    inputs = case.inputs(device)
    first = run(inputs, impl)
    for repeat in range(repeats):
        assert not same_bits(first, run(inputs, impl)), f"run {repeat}"


def test_calls_from_several_threads_do_not_disturb_each_other(device: str) -> None:
    wanted = [run(case.inputs(device), "fused") for case in CASES]

    def differences_from(first: int) -> list[str]:
        differences: list[str] = []
        for n in range(first, first + 2 * len(CASES)):
            case = CASES[n % len(CASES)]
            differences.extend(same_bits(wanted[n % len(CASES)], run(case.inputs(device), "fused")))
        return differences

    with ThreadPoolExecutor(4) as workers:
        assert not [name for names in workers.map(differences_from, range(4)) for name in names]


def test_a_sequence_gives_the_same_bits_whatever_its_neighbours(device: str) -> None:
    case = Case("f32", 64, seqlen_q=130, seqlen_k=150, batch=3, causal=True)
    inputs = case.inputs(device)
    together = run(inputs, "fused")
    for b in range(3):
        alone = case.inputs(device)
        alone.leaves = {name: x[b : b + 1].detach().requires_grad_() for name, x in inputs.leaves.items()}
        alone.args = tuple(alone.leaves.values())
        alone.d_o, alone.d_lse = inputs.d_o[b : b + 1], inputs.d_lse[b : b + 1]
        assert not same_bits({name: x[b : b + 1].contiguous() for name, x in together.items()}, run(alone, "fused"))
