"""The acceptance rule refuses wrong results: it is neither vacuous nor blind to one element."""

import math

import pytest
import torch

from .cases import Case
from .checks import assert_correct, run

CASE = Case("bf16", 64, seqlen_q=65, seqlen_k=97, causal=True, lengths_q=(65, 20), lengths_k=(31, 97))


@pytest.fixture
def results() -> dict[str, torch.Tensor]:
    return run(CASE.inputs(), "naive")


def assert_refused(results: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        assert_correct(results, CASE)


def test_correct_results_pass(results: dict[str, torch.Tensor]) -> None:
    assert_correct(results, CASE)


@pytest.mark.parametrize("name", ["o", "d_q", "d_k", "d_v"])
def test_a_small_systematic_error_is_refused(results: dict[str, torch.Tensor], name: str) -> None:
    results[name] = results[name] * 1.03
    assert_refused(results, f"{name}: m.* error .* worst at")


@pytest.mark.parametrize("name", ["o", "lse", "d_q", "d_k", "d_v"])
def test_one_wrong_element_is_refused(results: dict[str, torch.Tensor], name: str) -> None:
    at = (1, 1, 3, 5)[: results[name].dim()]
    results[name][at] += 0.1
    assert_refused(results, rf"{name}: max error .*{', '.join(map(str, at))}".replace("(", r"\("))


def test_lse_is_held_to_float32_though_the_inputs_are_bfloat16(results: dict[str, torch.Tensor]) -> None:
    results["lse"] = results["lse"] * (1 + 1e-4)
    assert_refused(results, "lse: m")


@pytest.mark.parametrize("name", ["o", "lse", "d_q"])
def test_nan_is_refused(results: dict[str, torch.Tensor], name: str) -> None:
    results[name].view(-1)[-1] = math.nan
    assert_refused(results, f"{name}: 1 of .* NaN")


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_infinities_must_stand_in_the_same_places(results: dict[str, torch.Tensor], value: float) -> None:
    assert results["lse"][1, 0, 30] == -math.inf
    results["lse"][1, 0, 30] = value
    assert_refused(results, r"lse: infinities differ in 1 places, at \(1, 0, 30\)")


def test_another_dtype_is_refused(results: dict[str, torch.Tensor]) -> None:
    results["d_v"] = results["d_v"].float()
    assert_refused(results, "d_v: torch.float32")
