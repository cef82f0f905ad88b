"""Attention over a key/value cache is correct, stores the new tokens, and touches nothing else: one table of cases for
every kernel. Rows of no token hold NaN in all of them."""

import pytest

from flash_attention import _C, explain_with_kvcache

from .cache_cases import CacheCase
from .cache_checks import assert_caches_correct, assert_correct, run, serves
from .cache_table import CASES
from .conftest import CACHE_IMPLS, each_cache_kernel


@each_cache_kernel()
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_results_and_caches_are_those_of_the_oracle(case: CacheCase, device: str, impl: str) -> None:
    arguments = case.inputs(device)
    if not serves(impl, arguments):
        pytest.skip(f"{impl} does not take this")
    got = run(arguments, impl)
    assert_correct(got, case, device)
    assert_caches_correct(case, arguments, device)


@each_cache_kernel("auto")
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.id)
def test_lengths_and_tables_do_not_change(case: CacheCase, device: str, impl: str) -> None:
    arguments, before = case.inputs(device), case.inputs(device)
    if not serves(impl, arguments):
        pytest.skip(f"{impl} does not take this")
    run(arguments, impl)
    for name, x in before.items():
        if not name.endswith("_cache") and hasattr(x, "shape"):
            assert x.equal(arguments[name]), name


def test_explain_says_of_each_kernel_what_it_would_do(device: str) -> None:
    arguments = CacheCase("f16", head_dim=64).inputs(device)
    rows = explain_with_kvcache(**arguments)
    assert [(row.impl, row.device) for row in rows] == _C.kernels()
    assert [row.verdict for row in rows].count("chosen") == 1
    for row in rows:
        if row.impl not in CACHE_IMPLS[row.device]:
            assert "has no attention over a cache" in row.verdict
        elif row.device == device:
            assert row.verdict in ("chosen", "slower")
        if row.device != device:
            assert f"runs on {row.device}, the tensors are on {device}" in row.verdict
    chosen = next(row.impl for row in rows if row.verdict == "chosen")
    others = [row for row in explain_with_kvcache(**arguments, impl=chosen) if row.verdict == "slower"]
    assert not others
