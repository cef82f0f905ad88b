"""A fixed stretch of the random cases of tests/fuzz.py; `make fuzz` goes on for as long as asked."""

import pytest

from .fuzz import failure

CHUNK = 20


@pytest.mark.parametrize(
    ("impl", "first"),
    [("auto", n) for n in range(0, 500, CHUNK)]
    + [("naive", n) for n in range(500, 600, CHUNK)]
    + [("reference", n) for n in range(600, 640, CHUNK)],
)
def test_random_cases_are_correct(impl: str, first: int) -> None:
    failures = [text for n in range(first, first + CHUNK) if (text := failure(0, n, "cpu", impl))]
    assert not failures, "\n\n".join(failures)


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 500, CHUNK))
def test_random_cases_are_correct_on_the_gpu(first: int) -> None:
    failures = [text for n in range(first, first + CHUNK) if (text := failure(0, n, "cuda", "auto"))]
    assert not failures, "\n\n".join(failures)
