"""python -m flash_attention says what is installed, what the machine has and which kernels are live."""

import subprocess
import sys
from pathlib import Path

from flash_attention import _C, __version__

ROOT = Path(__file__).parent.parent


def test_it_prints_version_build_devices_instruction_set_and_kernels() -> None:
    command = [sys.executable, "-m", "flash_attention"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    assert __version__ in text
    assert _C.cpu_isa() in text
    for words in ("torch", "devices", "cpu", "instruction set", "live kernels", "fused (cpu)", "naive (cpu)"):
        assert words in text
