"""Attention over a key/value cache is correct, stores the new tokens, and touches nothing else: one table of cases for
every kernel. Rows of no token hold NaN in all of them."""

import pytest

from .cache_cases import CacheCase
from .cache_checks import assert_caches_correct, assert_correct, run, serves
from .cache_table import CASES
from .conftest import each_cache_kernel


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
