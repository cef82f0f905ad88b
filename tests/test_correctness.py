"""Every kernel gives the oracle's o, lse and gradients over the whole case table."""

import pytest

from .cases import Case
from .checks import assert_correct, run
from .conftest import DEVICES, IMPLS
from .table import CASES


@pytest.mark.parametrize("impl", IMPLS["cpu"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_gradients_are_correct(case: Case, device: str, impl: str) -> None:
    if impl not in IMPLS[device]:
        pytest.skip(f"{impl} does not run on {device}")
    assert_correct(run(case.inputs(device), impl), case, device)
