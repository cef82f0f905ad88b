"""Over a key/value cache a call on a GPU runs on the current stream, can be captured once for all lengths and pages,
and trusts neither."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention import flash_attention_with_kvcache, workspace_bytes_with_kvcache

from .cache_cases import CacheCase, bits
from .cache_checks import run, same_bits, serves
from .conftest import CACHE_IMPLS
from .test_streams import SPIN, capture

pytestmark = pytest.mark.gpu

CASES = (
    CacheCase("bf16", head_dim=64, heads_q=8, lengths=(130, 7, 0)),
    CacheCase("f16", head_dim=128, heads_q=8, page_size=16, lengths=(300, 31), rotary="halves"),
    CacheCase("bf16", head_dim=128, float8=True, descale="bh", page_size=64, lengths=(300, 31), seqlen_q=5, tree="one"),
    CacheCase("f32", page_size=16, alibi="h", sinks=True, seqlen_q=3),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_impl = pytest.mark.parametrize("impl", [x for x in CACHE_IMPLS["cuda"] if x != "auto"] or ["fused"])
CHANGING = ("q", "k", "v", "k_cache", "v_cache", "cache_seqlens", "page_table")


def inputs(case: CacheCase, impl: str) -> dict[str, Any]:
    arguments = case.inputs("cuda")
    if not serves(impl, arguments):
        pytest.skip(f"{impl} does not take this")
    return arguments


def written(results: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {**results, "k_cache": arguments["k_cache"], "v_cache": arguments["v_cache"]}


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert [name for name in want if not same_bits(got[name], want[name])] == []


@each_impl
@each_case
def test_a_call_waits_for_what_its_stream_did_before(case: CacheCase, impl: str) -> None:
    arguments, later = inputs(case, impl), inputs(case, impl)
    want = written(run(arguments, impl), arguments)
    values = {name: later[name].clone() for name in CHANGING if name in later}
    for name in values:
        later[name].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(SPIN)  # on any other stream the call would read zeros
        for name, value in values.items():
            later[name].copy_(value)
        got = written(run(later, impl), later)
    torch.cuda.synchronize()
    assert_same_bits(got, want)


# Lets the next kernel start before it writes the lengths (PTX ISA, "griddepcontrol").
WRITE_LATE = r"""
extern "C" __global__ void write_late(int *lengths, const int *values, int count) {
    asm volatile("griddepcontrol.launch_dependents;");
    for (const long long start = clock64(); clock64() - start < 100000;) {}
    for (int n = threadIdx.x; n < count; n += blockDim.x) lengths[n] = values[n];
}
"""
LATE = (
    CacheCase("bf16", head_dim=128, heads_q=8, lengths=(2000, 31, 700), rotary="halves"),
    CacheCase("f16", head_dim=64, heads_q=8, page_size=16, lengths=(900, 0), seqlen_q=3),
    CacheCase("bf16", head_dim=128, heads_q=4, lengths=tuple(range(140))),
)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="kernels do not start early"
)
@each_impl
@pytest.mark.parametrize("case", LATE, ids=lambda case: case.id)
def test_a_call_that_starts_early_sees_lengths_written_late(case: CacheCase, impl: str) -> None:
    write_late = torch.cuda._compile_kernel(WRITE_LATE, "write_late")  # noqa: SLF001
    arguments = inputs(case, impl)
    lengths = arguments["cache_seqlens"].clone()
    want = written(run(arguments, impl), arguments)
    for early in (lengths * 0, lengths.flip(0), lengths + 1, lengths):
        later = inputs(case, impl)
        later["cache_seqlens"].copy_(early)
        torch.cuda.synchronize()
        write_late((1, 1, 1), (128, 1, 1), [later["cache_seqlens"], lengths, len(lengths)])
        assert_same_bits(written(run(later, impl), later), want)


@each_impl
@pytest.mark.parametrize("page_size", [None, 16])
def test_calls_that_follow_each_other_do_not_disturb_each_other(page_size: int | None, impl: str) -> None:
    """In one graph, over the same memory for what blocks tell each other: each call has other queries and lengths."""
    case = CacheCase("bf16", head_dim=128, heads_q=8, lengths=(3000, 3000), append=False, page_size=page_size)
    arguments = inputs(case, impl)
    calls = []
    for lengths in ((3000, 2500), (1, 2900), (129, 0), (2999, 3000), (640, 641), (3000, 1)):
        other = dict(arguments, q=torch.randn_like(arguments["q"]))
        other["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        calls.append((other, run(other, impl)))
    graph, results = capture(lambda: [run(other, impl) for _ in range(3) for other, _ in calls])
    for _ in range(50):
        for result in results:
            for tensor in result.values():
                tensor.fill_(float("nan"))
        graph.replay()
        for n, result in enumerate(results):
            assert_same_bits(result, calls[n % len(calls)][1])


GROWING = [dataclasses.replace(case, slack=60, whole_table=True) for case in CASES]


@each_impl
@pytest.mark.parametrize("case", GROWING, ids=lambda case: case.id)
def test_one_graph_serves_growing_lengths_and_changing_pages(case: CacheCase, impl: str) -> None:
    """Decoding by replays of one graph, which counts its tokens itself; pages are handed out between replays."""
    kept, eager = inputs(case, impl), inputs(case, impl)
    lengths = kept["cache_seqlens"].clone()

    def call() -> tuple[Tensor, ...]:
        o, lse = run(kept, impl).values()
        kept["cache_seqlens"] += case.seqlen_q
        return o, lse

    graph, (o, lse) = capture(call)
    kept["cache_seqlens"].copy_(lengths)
    for step in range(60 // case.seqlen_q):
        for name in ("q", "k", "v"):
            kept[name].copy_(torch.randn(kept[name].shape))
            eager[name].copy_(kept[name])
        if "page_table" in kept:  # two pages of a sequence change places, in memory and in the table
            one, other = kept["page_table"][0, :2].tolist()
            for arguments in (kept, eager):
                for cache in (bits(arguments["k_cache"]), bits(arguments["v_cache"])):
                    cache[[one, other]] = cache[[other, one]]
                arguments["page_table"][0, :2] = torch.tensor([other, one])
        graph.replay()
        want = run(eager, impl)
        eager["cache_seqlens"] += case.seqlen_q
        assert_same_bits(written({"o": o, "lse": lse}, kept), written(want, eager))
        assert kept["cache_seqlens"].equal(eager["cache_seqlens"]), step


# ---- lengths and pages that are wrong -------------------------------------------------------------------------------

WRONG_LENGTHS = {"negative": (-1, -(2**31), -7), "too large": (81, 2**31 - 1, 10**6), "mixed": (-5, 2**31 - 1, 3)}
KV = ("k_cache", "v_cache")


def guarded(case: CacheCase, impl: str) -> tuple[dict[str, Any], list[Tensor]]:
    """The case's inputs with caches and rotary tables amid larger tensors of NaN, but none in them; the larger caches.
    What is read outside is NaN, what is written there shows."""
    arguments, wholes = inputs(case, impl), []
    for name in (*KV, "rotary_cos", "rotary_sin"):
        if name not in arguments:
            continue
        x = arguments[name]
        whole = torch.full((len(x) + 2, *x.shape[1:]), torch.nan, device="cuda").to(x.dtype)
        bits(whole)[1:-1] = bits(x.float().nan_to_num(1).to(x.dtype))
        arguments[name] = whole[1:-1]
        wholes += [whole] * (name in KV)
    return arguments, wholes


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@each_impl
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("name", WRONG_LENGTHS)
def test_wrong_lengths_are_cut_to_the_cache(name: str, page_size: int | None, append: bool, impl: str) -> None:
    case = CacheCase("bf16", head_dim=64, lengths=(40, 30, 70), seqlen_q=2, append=append, page_size=page_size)
    case = dataclasses.replace(case, slack=80 - case.longest, whole_table=True, rotary="halves" if append else None)
    arguments, wholes = guarded(case, impl)
    before = [whole.clone() for whole in wholes]
    lengths = int32(*WRONG_LENGTHS[name])
    got = run(arguments | {"cache_seqlens": lengths}, impl)
    torch.cuda.synchronize()
    assert not got["o"].isnan().any() and not got["lse"].isnan().any()
    for whole, old in zip(wholes, before, strict=True):
        assert same_bits(whole[0], old[0]) and same_bits(whole[-1], old[-1])
    cut = lengths.clamp(0, 80)
    if append:  # tokens beyond the cache are not stored
        for whole, old in zip(wholes, before, strict=True):
            for b in (cut == 80).nonzero().flatten().tolist():
                pages = 1 + (arguments["page_table"][b].long() if page_size else torch.tensor([b]))
                assert same_bits(whole[pages], old[pages])
    else:
        assert_same_bits(got, run(arguments | {"cache_seqlens": cut}, impl))
        assert all(same_bits(whole, old) for whole, old in zip(wholes, before, strict=True))


@each_impl
@pytest.mark.parametrize("float8", [False, True])
def test_pages_that_do_not_exist_are_zeros_and_never_written(float8: bool, impl: str) -> None:
    case = CacheCase("bf16", head_dim=64, lengths=(40, 30, 60), seqlen_q=10, page_size=16, slack=0, float8=float8)
    arguments, wholes = guarded(dataclasses.replace(case, whole_table=True), impl)
    table, pages = arguments["page_table"], len(arguments["k_cache"])
    gone = {(0, 1): -1, (0, 2): 2**31 - 1, (1, 2): pages, (2, 0): -(2**31)}  # (0, 2) and (1, 2) are to be written
    wrong = table.clone()
    for place, page in gone.items():
        wrong[place] = page
    lost = [1 + int(table[place]) for place in gone]
    before = [whole.clone() for whole in wholes]
    run(arguments | {"page_table": wrong}, impl)
    torch.cuda.synchronize()
    for whole, old in zip(wholes, before, strict=True):
        assert all(same_bits(whole[page], old[page]) for page in (0, *lost, -1))
        assert not same_bits(whole, old)

    reading = {name: x for name, x in arguments.items() if name not in ("k", "v")}
    got = run(reading | {"page_table": wrong}, impl)
    for whole in wholes:
        bits(whole)[lost] = 0
    assert_same_bits(got, run(reading, impl))


def test_checked_lengths_and_pages_are_refused_by_name_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CacheCase("bf16", head_dim=64, page_size=16, seqlen_q=3, lengths=(40, 30), whole_table=True)
    arguments, wholes = guarded(case, "auto")
    arguments["out"] = torch.full_like(arguments["q"], 7)
    before = [whole.clone() for whole in wholes]
    monkeypatch.setenv("FLASH_ATTENTION_CHECK", "1")
    bad = arguments["page_table"].clone()
    bad[1, 1] = 10**6
    rows = (
        ({"cache_seqlens": int32(-1, 5)}, r"cache_seqlens\[0\] = -1: must be between 0 and the 48 tokens"),
        ({"cache_seqlens": int32(5, 46)}, r"cache_seqlens\[1\] = 46 and 3 new tokens: the cache holds 48"),
        ({"page_table": bad}, "sequence 1: page 1 is 1000000, must be between 0 and"),
        ({"page_table": bad.repeat(1, 2)[:, :3]}, "sequence 1: page 1 is 1000000"),  # rows apart in memory
    )
    for changed, words in rows:
        with pytest.raises(ValueError, match=words):
            flash_attention_with_kvcache(**(arguments | changed))
    torch.cuda.synchronize()
    assert all(same_bits(whole, old) for whole, old in zip(wholes, before, strict=True))
    assert (arguments["out"] == 7).all()
    flash_attention_with_kvcache(**arguments)
    table = arguments.pop("page_table")
    arguments["cache_seqlens"] = int32(5, 0)
    with pytest.raises(ValueError, match=r"page_table \(cache_batch_idx\) of sequence 0"):
        flash_attention_with_kvcache(**arguments, cache_batch_idx=table[:, 0] + 10**6)


@pytest.mark.parametrize("name", ["k_cache", "v", "cache_seqlens", "page_table", "out"])
def test_an_input_on_another_device_is_refused_by_name(name: str) -> None:
    arguments = CASES[1].inputs("cuda")
    arguments["out"] = torch.empty_like(arguments["q"])
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=f"{name} is on cpu and q is on cuda:0: all tensors must be on one device"):
        flash_attention_with_kvcache(**arguments)


@each_impl
def test_no_more_memory_is_taken_than_the_workspace_and_the_results(impl: str) -> None:
    case = CacheCase("bf16", head_dim=128, heads_q=32, heads_kv=8, lengths=(9000,) * 4, page_size=64)
    arguments = inputs(case, impl)
    needed = workspace_bytes_with_kvcache(**arguments, impl=impl)
    run(arguments, impl)
    torch.cuda.synchronize()
    # What is asked for: the allocator gives what it has, up to 1 MiB more.
    held = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    o, lse = run(arguments, impl).values()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert peak - held <= needed + o.nbytes + lse.nbytes
    assert needed < arguments["k_cache"].nbytes  # no copy of it
