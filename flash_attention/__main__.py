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
