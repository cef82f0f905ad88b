"""python -m flash_attention: what is installed, what the machine has, which kernels are live."""

from __future__ import annotations

import platform
import sys

import torch

from flash_attention import _C, __version__


def _devices() -> str:
    names = [f"cpu ({torch.get_num_threads()} threads)"]
    names += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _cuda(built_for: list[str]) -> str:
    """Whether a GPU is used, and what would have to change for it."""
    if not torch.cuda.is_available():
        seen = "no GPU is seen" if torch.backends.cuda.is_built() else "this torch is built without CUDA"
        return f"not used: {seen}"
    if "cuda" not in built_for:
        return "not used: this build has no kernels for it; build again with FA_CUDA=1, which needs nvcc"
    return f"used, by way of CUDA {torch.version.cuda} in torch"


def main() -> None:
    kernels = _C.kernels()
    built_for = sorted({device for _, device in kernels})
    live = [device for device in built_for if device == "cpu" or torch.cuda.is_available()]
    rows = {
        "flash_attention": __version__,
        "built for": ", ".join(built_for),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "devices": _devices(),
        "instruction set": _C.cpu_isa(),
        "cuda": _cuda(built_for),
        "live kernels": ", ".join(f"{impl} ({device})" for impl, device in kernels if device in live),
        "loaded from": _C.__file__,
    }
    for name, value in rows.items():
        print(f"{name:<16} {value}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
