"""Every test runs with uninitialised memory filled with NaN (integers: the largest), so that what a kernel forgets to
write, or reads before it writes, shows. Here too: which devices and kernels the tests are for."""

import os
from collections.abc import Iterator

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # thousands of small calls: spinning threads would starve each other
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic, and warns

import pytest  # noqa: E402
import torch  # noqa: E402

from flash_attention import _C  # noqa: E402

from .checks import FORWARD_ONLY, NO_FLOAT64  # noqa: E402

IMPLS = {device: (*(impl for impl, on in _C.kernels() if on == device), "auto") for device in ("cpu", "cuda")}
HAS_CUDA = torch.cuda.is_available() and len(IMPLS["cuda"]) > 1  # a GPU, and kernels for it
DEVICES = ["cpu", *[pytest.param("cuda", marks=pytest.mark.gpu)] * HAS_CUDA]


def each_kernel(*without: str, backward: bool = False) -> pytest.MarkDecorator:
    """Parametrises `device` and `impl`: every kernel but those named; with `backward`, those that have one."""
    left_out = (*without, *FORWARD_ONLY) if backward else without
    return pytest.mark.parametrize(
        ("device", "impl"),
        [
            pytest.param(device, impl, marks=[pytest.mark.gpu] * (device == "cuda"))
            for device in ("cpu", "cuda")[: 1 + HAS_CUDA]
            for impl in IMPLS[device]
            if impl not in left_out
        ],
    )


def skip_unless_served(impl: str, dtype: str | torch.dtype) -> None:
    if impl in NO_FLOAT64 and dtype in ("f64", torch.float64):
        pytest.skip(f"{impl} takes no float64")


def pytest_report_header() -> str:
    return "kernels: " + ", ".join(f"{impl} ({device})" for impl, device in _C.kernels()) + "; GPU" * HAS_CUDA


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and kernels built for it"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty returns
    assert torch.empty(100).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
