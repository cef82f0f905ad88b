"""A fixed stretch of the random cases of tests/fuzz.py; `make fuzz` goes on for as long as asked."""

import pytest

from .conftest import CACHE_IMPLS, DEVICES, IMPLS
from .fuzz import cache_failure, failure

CHUNK = 20
STRETCHES = {"auto": (0, 500), "naive": (500, 600), "reference": (600, 640), "split": (640, 740), "fused": (740, 840)}
STRETCHES["tensor_core"] = (840, 1240)  # refuses two of three


@pytest.mark.parametrize(
    ("impl", "first"), [(impl, n) for impl, stretch in STRETCHES.items() for n in range(*stretch, CHUNK)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_random_cases_are_correct(device: str, impl: str, first: int) -> None:
    if impl not in IMPLS[device]:
        pytest.skip(f"{impl} does not run on {device}")
    failures = [text for n in range(first, first + CHUNK) if (text := failure(0, n, device, impl))]
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("impl", ["auto", "fused", "tensor_core", "reference"])
@pytest.mark.parametrize("first", range(0, 100, CHUNK))
@pytest.mark.parametrize("device", DEVICES)
def test_random_cases_over_a_cache_are_correct(device: str, first: int, impl: str) -> None:
    if impl not in CACHE_IMPLS[device]:
        pytest.skip(f"{impl} does not run on {device}")
    failures = [text for n in range(first, first + CHUNK) if (text := cache_failure(0, n, device, impl))]
    assert not failures, "\n\n".join(failures)
