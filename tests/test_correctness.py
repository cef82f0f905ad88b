"""Every kernel gives the oracle's o, lse and gradients over the whole case table."""

import pytest

from .cases import Case
from .checks import NO_FLOAT64, assert_correct, run
from .conftest import each_kernel
from .table import CASES


@each_kernel()  # the innermost loop, so that the kernels share what is expected of a case
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_gradients_are_correct(case: Case, device: str, impl: str) -> None:
    if impl in NO_FLOAT64 and case.dtype == "f64":
        with pytest.raises(ValueError, match=f"impl '{impl}' cannot serve this request: .*float64"):
            run(case.inputs(device), impl)
    else:
        assert_correct(run(case.inputs(device), impl), case, device)
