"""A call on a GPU runs on its tensors' device and that device's current stream, can be captured in a CUDA graph, and
trusts no length that lies there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention import flash_attention, flash_attention_varlen

from .cases import Case, Inputs
from .checks import FORWARD_ONLY
from .conftest import IMPLS, skip_unless_served

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

CASES = (
    Case("bf16", 64, seqlen_q=100, seqlen_k=130, causal=True),
    Case("f16", 128, heads_q=4, heads_kv=2, layout="blhd", dropout_p=0.2, sinks=True, bias="1h1k", alibi="h"),
    Case("f32", 32, lengths_q=(33, 9), lengths_k=(5, 33)),
    Case("bf16", 64, packed=True, lengths_q=(40, 3, 70), lengths_k=(50, 0, 64), causal=True),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_impl = pytest.mark.parametrize("impl", IMPLS["cuda"] if len(IMPLS["cuda"]) > 1 else ["fused"])

SPIN = 200_000_000  # clock cycles: about 0.1 s


def forward(inputs: Inputs, impl: str) -> tuple[Tensor, Tensor]:
    function = flash_attention_varlen if inputs.case.packed else flash_attention
    return function(*inputs.args, **inputs.options, **inputs.max_seqlens, return_lse=True, impl=impl)


def forward_and_backward(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    o, lse = forward(inputs, impl)
    return o, lse, *gradients((o, lse), tuple(inputs.leaves.values()), (inputs.d_o, inputs.d_lse), impl)


def gradients(
    results: tuple[Tensor, ...], leaves: tuple[Tensor, ...], of_results: tuple[Tensor, ...], impl: str
) -> tuple[Tensor, ...]:
    """None of a kernel that has no backward."""
    return () if impl in FORWARD_ONLY else torch.autograd.grad(results, leaves, of_results)


def on_gpu(case: Case, device: str = "cuda") -> Inputs:
    """The case's inputs, its seed a tensor there."""
    inputs = case.inputs(device)
    if case.dropout_p:
        inputs.options["seed"] = torch.tensor([case.seed], dtype=torch.int64, device=device)
    return inputs


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for n, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), f"result {n}"


def changing_tensors(inputs: Inputs) -> list[Tensor]:
    """Every tensor that a call reads, in one order for equal cases."""
    options = [x for name, x in inputs.options.items() if isinstance(x, Tensor) and name not in inputs.leaves]
    return [*(x.detach() for x in inputs.leaves.values()), *inputs.args[3:], *options, inputs.d_o, inputs.d_lse]


# ---- streams --------------------------------------------------------------------------------------------------------


@each_impl
@each_case
def test_a_call_waits_for_what_its_stream_did_before(case: Case, impl: str) -> None:
    skip_unless_served(impl, case)
    inputs, later = on_gpu(case), on_gpu(case)
    expected = forward_and_backward(inputs, impl)
    values = [x.clone() for x in changing_tensors(later)]
    for x in changing_tensors(later):
        x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(SPIN)  # on any other stream the call would read zeros
        for x, value in zip(changing_tensors(later), values, strict=True):
            x.copy_(value)
        got = forward_and_backward(later, impl)
    torch.cuda.synchronize()
    assert_same_bits(got, expected)


def test_streams_do_not_wait_for_each_other() -> None:
    q = torch.randn(1, 2, 64, 64, device="cuda")
    busy, free = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(free):
        flash_attention(q, q, q)  # loads kernels and takes memory, for which the device may have to be idle
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(SPIN)
    with torch.cuda.stream(free):
        flash_attention(q, q, q)
    free.synchronize()
    assert not busy.query()
    torch.cuda.synchronize()


# ---- CUDA graphs ----------------------------------------------------------------------------------------------------


def capture(call: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    with torch.cuda.stream(torch.cuda.Stream()):
        call()  # warm
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@each_impl
@each_case
@pytest.mark.parametrize("call", [forward, forward_and_backward], ids=lambda call: call.__name__)
def test_a_replayed_graph_gives_the_bits_of_an_eager_call(call: Callable[..., Any], case: Case, impl: str) -> None:
    skip_unless_served(impl, case)
    inputs = on_gpu(case)
    graph, results = capture(lambda: call(inputs, impl))
    for seed in (1, 2):
        other = on_gpu(dataclasses.replace(case, seed=seed))
        for x, value in zip(changing_tensors(inputs), changing_tensors(other), strict=True):
            x.copy_(value)
        graph.replay()
        assert_same_bits(results, call(other, impl))


@each_impl
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_lengths_may_change_between_replays(packed: bool, impl: str) -> None:
    shape = (90, 2, 64) if packed else (2, 2, 45, 64)
    q, k, v, d_o = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    kept = torch.tensor([0, 45, 90] if packed else [45, 45], dtype=torch.int32, device="cuda")

    def call(lengths: Tensor) -> tuple[Tensor, ...]:
        if packed:
            o = flash_attention_varlen(q, k, v, lengths, lengths, 90, 90, causal=True, impl=impl)
        else:
            o = flash_attention(q, k, v, seqlens_q=lengths, seqlens_k=lengths, causal=True, impl=impl)
        return o, *gradients((o,), (q, k, v), (d_o,), impl)

    graph, results = capture(lambda: call(kept))
    for lengths in ([0, 90, 90], [0, 7, 31]) if packed else ([45, 0], [31, 7]):
        changed = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        kept.copy_(changed)
        graph.replay()
        assert_same_bits(results, call(changed))


def test_dropout_without_a_seed_drops_anew_on_every_replay() -> None:
    q = torch.randn(1, 2, 64, 64, device="cuda")
    graph, (o,) = capture(lambda: (flash_attention(q, q, q, dropout_p=0.5),))
    graph.replay()
    first = o.clone()
    graph.replay()
    assert not torch.equal(first, o)


# ---- devices --------------------------------------------------------------------------------------------------------


@two_gpus
@each_impl
@each_case
def test_a_call_runs_on_the_gpu_of_its_tensors(case: Case, impl: str) -> None:
    skip_unless_served(impl, case)
    expected = forward_and_backward(on_gpu(case, "cuda:0"), impl)
    assert torch.cuda.current_device() == 0
    inputs = on_gpu(case, "cuda:1")
    torch.cuda.synchronize(1)
    with torch.cuda.stream(torch.cuda.Stream("cuda:1")), torch.cuda.device(0):
        got = forward_and_backward(inputs, impl)
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert all(x.device.index == 1 for x in got)
    assert_same_bits(tuple(x.to("cuda:0") for x in got), expected)


WRONG = ("cpu", pytest.param("cuda:1", marks=two_gpus))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["k", "v", "bias", "alibi_slopes", "sinks", "seqlens_q", "seqlens_k", "seed"])
def test_an_input_on_another_device_is_refused_by_name(name: str, wrong: str) -> None:
    inputs = Case(bias="hq1", alibi="h", sinks=True, lengths_q=(9, 33), lengths_k=(33, 4), dropout_p=0.5).inputs("cuda")
    arguments = {**dict(zip("qkv", inputs.args, strict=True)), **inputs.options}
    arguments["seed"] = torch.ones(1, dtype=torch.int64, device="cuda")
    arguments[name] = arguments[name].to(wrong)
    with pytest.raises(ValueError, match=f"{name} is on {wrong} and q is on cuda:0: all tensors must be on one device"):
        flash_attention(**arguments)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_cumulative_lengths_on_another_device_are_refused_by_name(name: str) -> None:
    q = torch.randn(9, 1, 8, device="cuda")
    lengths = {n: torch.tensor([0, 9], dtype=torch.int32, device="cuda") for n in ("cu_seqlens_q", "cu_seqlens_k")}
    lengths[name] = lengths[name].cpu()
    with pytest.raises(ValueError, match=f"{name} is on cpu and q is on cuda:0"):
        flash_attention_varlen(q, q, q, **lengths, max_seqlen_q=9, max_seqlen_k=9)


def test_q_on_the_cpu_beside_k_on_a_gpu_is_refused() -> None:
    q = torch.randn(1, 1, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="k is on cuda:0 and q is on cpu"):
        flash_attention(q, q.cuda(), q)


# ---- lengths that are wrong -----------------------------------------------------------------------------------------

B, L, H, D = 3, 40, 2, 64
INT32_MAX = 2**31 - 1
GARBAGE = {
    "negative": (-1, -INT32_MAX - 1, -7),
    "too large": (L + 1, INT32_MAX, 10**6),
    "mixed": (-5, INT32_MAX, 3),
}
CUMULATIVE_GARBAGE = {
    "decreasing": (0, 80, 40, 120),
    "negative": (0, -40, INT32_MAX, -INT32_MAX - 1),
    "beyond": (0, 40, 121, INT32_MAX),
    "starts late": (50, 60, 70, 120),
}


def int32(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def guarded(*shape: int) -> tuple[Tensor, Tensor]:
    """A leaf amid a larger tensor of NaN, and that one: what is read outside is NaN, what is written shows."""
    whole = torch.full((shape[0] + 2, *shape[1:]), torch.nan, device="cuda", dtype=torch.bfloat16)
    whole[1:-1] = torch.randn(shape, device="cuda")
    return whole[1:-1].requires_grad_(), whole


def results(
    call: Callable[..., Tensor], inputs: tuple[Tensor, ...], lengths: tuple[Tensor, Tensor], impl: str
) -> tuple[Tensor, ...]:
    o = call(*inputs, *lengths)
    got = o, *gradients((o,), inputs, (torch.ones_like(o),), impl)
    torch.cuda.synchronize()
    return got


@each_impl
@pytest.mark.parametrize("name", GARBAGE)
def test_wrong_lengths_are_cut_to_the_tensors(name: str, impl: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, seqlens_q: Tensor, seqlens_k: Tensor) -> Tensor:
        return flash_attention(q, k, v, seqlens_q=seqlens_q, seqlens_k=seqlens_k, causal=True, impl=impl)

    garbage = int32(GARBAGE[name])
    (q, k, v), wholes = zip(*(guarded(B, H, L, D) for _ in range(3)), strict=True)
    before = tuple(x.detach().clone() for x in wholes)
    got = results(call, (q, k, v), (garbage, garbage.flip(0)), impl)
    cut = garbage.clamp(0, L)
    assert_same_bits(got, results(call, (q, k, v), (cut, cut.flip(0)), impl))
    assert not any(x.isnan().any() for x in got)
    assert_same_bits(wholes, before)


@each_impl
@pytest.mark.parametrize("name", CUMULATIVE_GARBAGE)
def test_wrong_cumulative_lengths_do_no_harm(name: str, impl: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
        return flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, L, L, causal=True, impl=impl)

    right, wrong = int32((0, 40, 80, 120)), int32(CUMULATIVE_GARBAGE[name])
    (q, k, v), wholes = zip(*(guarded(B * L, H, D) for _ in range(3)), strict=True)
    before = tuple(x.detach().clone() for x in wholes)
    expected = results(call, (q, k, v), (right, right), impl)
    for lengths in ((wrong, right), (right, wrong), (wrong, wrong)):  # rows of no sequence hold anything
        results(call, (q, k, v), lengths, impl)
        assert_same_bits(wholes, before)
    assert_same_bits(results(call, (q, k, v), (right, right), impl), expected)


def test_checked_lengths_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(B, H, L, D, device="cuda")
    packed = torch.randn(B * L, H, D, device="cuda")
    right = int32((0, 40, 80, 120))
    flash_attention(q, q, q, seqlens_k=int32(GARBAGE["negative"]))
    monkeypatch.setenv("FLASH_ATTENTION_CHECK", "1")
    flash_attention(q, q, q, seqlens_q=int32((0, L, 7)), seqlens_k=int32((L, 0, 7)))
    flash_attention_varlen(packed, packed, packed, right, right, L, L)
    for name in ("seqlens_q", "seqlens_k"):
        with pytest.raises(ValueError, match=rf"{name}\[1\] = -1: must be between 0 and the tensor's {L} rows"):
            flash_attention(q, q, q, **{name: int32((3, -1, 50))})
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[2\] = 40 after 80: must not decrease"):
        flash_attention_varlen(packed, packed, packed, int32((0, 80, 40, 120)), right, 80, L)
    with pytest.raises(ValueError, match="cu_seqlens_k: sequence 1 has 60 rows, more than max_seqlen 40"):
        flash_attention_varlen(packed, packed, packed, right, int32((0, 20, 80, 120)), L, L)
