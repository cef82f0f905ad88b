"""Every test runs with uninitialised memory filled with NaN (integers: the largest), so that what a kernel forgets to
write, or reads before it writes, shows."""

import os
from collections.abc import Iterator

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # thousands of small calls: spinning threads would starve each other

import pytest  # noqa: E402
import torch  # noqa: E402

DEVICES = ["cpu", *[pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()]
IMPLS = {"cpu": ("reference", "naive", "fused", "auto"), "cuda": ("naive", "fused", "auto")}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty returns
    assert torch.empty(100).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
