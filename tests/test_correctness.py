"""Every kernel gives the oracle's o, lse and gradients over the case table; it refuses what it does not promise."""

import pytest

from .cases import Case
from .checks import assert_correct, run, serves
from .conftest import each_kernel
from .table import CASES


@each_kernel()  # the innermost loop, so that the kernels share what is expected of a case
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_gradients_are_correct(case: Case, device: str, impl: str) -> None:
    if serves(impl, case):
        assert_correct(run(case.inputs(device), impl), case, device)
    else:
        with pytest.raises(ValueError, match=f"impl '{impl}' cannot serve this request: .*takes "):
            run(case.inputs(device), impl)


def test_tensor_cores_are_promised_a_good_part_of_the_table() -> None:
    served = [case for case in CASES if serves("tensor_core", case)]
    assert {case.dtype for case in served} == {"f32", "f16", "bf16"}
    assert {8, 24, 40, 72, 96, 104, 136, 160, 192, 200, 256} <= {case.head_dim for case in served}
    assert {1, 63, 64, 65, 127, 128, 129, 193} <= {case.seqlen_q for case in served} & {
        case.seqlen_k for case in served
    }
    assert len(served) > 150
