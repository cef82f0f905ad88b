"""python -m flash_attention says what is installed, what the machine has and which kernels are live."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_attention import _C, __version__
from flash_attention.__main__ import main

ROOT = Path(__file__).parent.parent


def test_it_prints_version_build_devices_instruction_set_and_kernels() -> None:
    command = [sys.executable, "-m", "flash_attention"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    assert __version__ in text
    assert _C.cpu_isa() in text
    for words in ("torch", "devices", "cpu", "instruction set", "live kernels", "fused (cpu)", "naive (cpu)"):
        assert words in text


@pytest.mark.parametrize("gpu", [False, True], ids=["without-a-gpu", "with-a-gpu"])
@pytest.mark.parametrize("built", [False, True], ids=["built-for-the-cpu", "built-for-cuda"])
def test_it_says_whether_a_gpu_is_used_and_why_not(
    gpu: bool, built: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = [("fused", "cuda")] * built + [("fused", "cpu")]
    monkeypatch.setattr(_C, "kernels", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    main()
    text = capsys.readouterr().out
    assert ("NVIDIA H200" in text) == gpu
    assert ("fused (cuda)" in text) == (gpu and built)
    assert ("FA_CUDA=1" in text) == (gpu and not built)
    assert ("not used" in text) == (not gpu or not built)
