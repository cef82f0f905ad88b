"""Every test runs with uninitialised memory filled with NaN (integers: the largest), so that what a kernel forgets to
write, or reads before it writes, shows. Here too: which devices and kernels the tests are for."""

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # thousands of small calls: spinning threads would starve each other
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic, and warns

import pytest  # noqa: E402
import torch  # noqa: E402

from flash_attention import _C, explain_with_kvcache  # noqa: E402

from .cases import Case  # noqa: E402
from .checks import FORWARD_ONLY, promises, serves  # noqa: E402

IMPLS = {device: (*(impl for impl, on in _C.kernels() if on == device), "auto") for device in ("cpu", "cuda")}
HAS_CUDA = torch.cuda.is_available() and len(IMPLS["cuda"]) > 1  # a GPU, and kernels for it
_TINY = torch.zeros(1, 1, 1, 8)
WITHOUT_CACHE = {  # kernels that have no attention over a cache
    (row.device, row.impl)
    for row in explain_with_kvcache(_TINY, _TINY, _TINY, cache_seqlens=1)
    if "no attention over a cache" in row.verdict
}
CACHE_IMPLS = {on: tuple(impl for impl in impls if (on, impl) not in WITHOUT_CACHE) for on, impls in IMPLS.items()}
DEVICES = ["cpu", *[pytest.param("cuda", marks=pytest.mark.gpu)] * HAS_CUDA]


def _kernels(without: tuple[str, ...], backward: bool) -> Iterator[tuple[str, str]]:
    left_out = (*without, *FORWARD_ONLY) if backward else without
    for device in ("cpu", "cuda")[: 1 + HAS_CUDA]:
        yield from ((device, impl) for impl in IMPLS[device] if impl not in left_out)


def _row(device: str, *values: object) -> Any:
    return pytest.param(device, *values, marks=[pytest.mark.gpu] * (device == "cuda"))


def each_kernel(*without: str, backward: bool = False) -> pytest.MarkDecorator:
    """Parametrises `device` and `impl`: every kernel but those named; with `backward`, those that have one."""
    return pytest.mark.parametrize(("device", "impl"), [_row(*kernel) for kernel in _kernels(without, backward)])


def each_kernel_and_dtype(*without: str, backward: bool = False) -> pytest.MarkDecorator:
    """Also `dtype`: float32 where the kernel takes it, and float16 where its 16 bits have arithmetic of their own.

    With float16 `auto` on a GPU may be one kernel forward and another backward.
    """
    return pytest.mark.parametrize(
        ("device", "impl", "dtype"),
        [
            _row(device, impl, dtype)
            for device, impl in _kernels(without, backward)
            for dtype in (torch.float32, torch.float16)
            if promises(impl, dtype)
            and (dtype == torch.float32 or device == "cuda" and impl in ("tensor_core", "auto"))
        ],
    )


def each_cache_kernel(*without: str) -> pytest.MarkDecorator:
    """Parametrises `device` and `impl`: every kernel over a key/value cache but those named."""
    kernels = [(on, impl) for on in ("cpu", "cuda")[: 1 + HAS_CUDA] for impl in CACHE_IMPLS[on] if impl not in without]
    return pytest.mark.parametrize(("device", "impl"), [_row(*kernel) for kernel in kernels])


def near(dtype: torch.dtype, factor: float = 4) -> dict[str, float]:
    """Tolerances of assert_close for numbers around 1: float32 as it has them itself, float16 `factor` roundings."""
    return {"rtol": 0, "atol": factor * torch.finfo(dtype).eps} if dtype == torch.float16 else {}


def skip_unless_served(impl: str, call: Case | str | torch.dtype, *head_dims: int) -> None:
    """call: a case, or a dtype with rows as torch allocates them."""
    if not (serves(impl, call) if isinstance(call, Case) else promises(impl, call, *head_dims)):
        pytest.skip(f"{impl} does not take this")


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
