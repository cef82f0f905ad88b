"""Over a key/value cache a sequence has the same bits on every run, whatever is beside it, however its keys are cut and
however many threads work on it."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from .cache_cases import CacheCase, bits
from .cache_checks import run, same_bits, serves
from .conftest import each_cache_kernel

SPLIT = (
    CacheCase("bf16", head_dim=64, heads_q=8, lengths=(700, 3, 0, 260)),
    CacheCase("f16", head_dim=128, heads_q=8, seqlen_q=5, lengths=(900, 130, 64), page_size=16),
    CacheCase("f32", head_dim=64, seqlen_q=2, lengths=(500, 77, 129), sinks=True, alibi="h"),
    CacheCase("bf16", head_dim=64, seqlen_q=33, lengths=(300, 0, 5), append=False, window=(200, 0)),
    CacheCase("bf16", head_dim=128, float8=True, descale="bh", lengths=(400, 31), page_size=64),
    CacheCase("f16", head_dim=64, tree="each", seqlen_q=9, lengths=(400, 31)),
)
each_split_case = pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.id)


@each_cache_kernel("reference")
@each_split_case
def test_no_bit_depends_on_num_splits(case: CacheCase, device: str, impl: str) -> None:
    if not serves(impl, case.inputs(device)):
        pytest.skip(f"{impl} does not take this")
    want = run(case.inputs(device), impl)
    for num_splits in (1, 2, 3, 7, 64, 1024):
        got = run(case.inputs(device), impl, num_splits=num_splits)
        assert all(same_bits(got[name], want[name]) for name in want), num_splits


@each_cache_kernel("reference")
@each_split_case
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(case: CacheCase, device: str, impl: str) -> None:
    if not serves(impl, case.inputs(device)):
        pytest.skip(f"{impl} does not take this")
    want = run(case.inputs(device), impl)
    for b in reversed(range(case.batch)):
        got = run(one_sequence(case.inputs(device), b), impl)
        assert all(same_bits(got[name][0], want[name][b]) for name in want), f"sequence {b} alone"
        many = one_sequence(case.inputs(device), b)
        for name, x in many.items():  # 40 times the same queries, over caches of their own
            if isinstance(x, Tensor) and x.dim() and name in (*PER_SEQUENCE, "k_cache", "v_cache"):
                many[name] = torch.cat([bits(x)] * 40).view(x.dtype)
        if "page_table" in many:
            pages = len(case.inputs(device)["k_cache"])
            many["page_table"] = many["page_table"].clamp(0, pages - 1) + torch.arange(
                0, 40 * pages, pages, dtype=torch.int32, device=device
            ).unsqueeze(1)
        got = run(many, impl)
        assert all(same_bits(x, want[name][b]) for name in want for x in got[name]), f"sequence {b} 40 times"


PER_SEQUENCE = ("q", "k", "v", "cache_seqlens", "page_table", "tree_mask", "k_descale", "v_descale")


def one_sequence(arguments: dict[str, Any], b: int) -> dict[str, Any]:
    """Of arguments whose tree_mask and descales are each sequence's own."""
    alone = {name: x[b : b + 1] if name in PER_SEQUENCE else x for name, x in arguments.items()}
    if "page_table" not in alone:
        alone |= {name: arguments[name][b : b + 1] for name in ("k_cache", "v_cache")}
    return alone


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.id)
@each_cache_kernel("reference", "auto")
def test_every_run_gives_the_same_bits(case: CacheCase, device: str, impl: str) -> None:
    if not serves(impl, case.inputs(device)):
        pytest.skip(f"{impl} does not take this")
    arguments = case.inputs(device)
    want = run(arguments, impl)  # and the new tokens, stored again, are the same
    for repeat in range(20 if device == "cpu" else 1000 if case is SPLIT[1] else 100):
        got = run(arguments, impl)
        assert all(same_bits(got[name], want[name]) for name in want), f"run {repeat}"


@each_split_case
def test_the_number_of_threads_changes_no_bit(case: CacheCase) -> None:
    count, results = torch.get_num_threads(), []
    large = dataclasses.replace(case, heads_q=16)  # worth more than one
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(large.inputs(), "fused"))
    finally:
        torch.set_num_threads(count)
    for got in results[1:]:
        assert all(same_bits(got[name], results[0][name]) for name in got)


def test_calls_from_several_threads_do_not_disturb_each_other(device: str) -> None:
    wanted = [run(case.inputs(device), "auto") for case in SPLIT]

    def differences_from(first: int) -> list[str]:
        differences: list[str] = []
        for n in range(first, first + 2 * len(SPLIT)):
            case, want = SPLIT[n % len(SPLIT)], wanted[n % len(SPLIT)]
            got = run(case.inputs(device), "auto")
            differences.extend(name for name in want if not same_bits(got[name], want[name]))
        return differences

    with ThreadPoolExecutor(4) as workers:
        assert not [name for names in workers.map(differences_from, range(4)) for name in names]
