"""Where and when a number was measured."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
_NOISE = r"\((r|tm)\)|@.*|\b(nvidia|geforce|processor|cpu|with radeon.*|\d+-core)\b"


@functools.cache
def device_name(device: str) -> str:
    """What the maker calls it: "AMD EPYC", "NVIDIA H200"."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0].strip() if models else platform.processor() or platform.machine()


@functools.cache
def machine_name(device: str) -> str:
    """Name of the machine's results folder: "amd-epyc-2core", "h200"."""
    words = re.sub(_NOISE, " ", device_name(device).lower())
    slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "unknown"
    return slug if device.startswith("cuda") and torch.cuda.is_available() else f"{slug}-{os.cpu_count()}core"


def results_folder(device: str) -> Path:
    return ROOT / "benchmarks" / "results" / machine_name(device)


@functools.cache
def commit() -> str:
    """Short hash of the checkout, "-dirty" if the library differs from it; "unknown" outside a checkout.

    FLASH_ATTENTION_COMMIT names it where the files were copied without their history.
    """
    if named := os.environ.get("FLASH_ATTENTION_COMMIT"):
        return named

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "flash_attention").stdout
        return git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def load_at_start() -> float:
    """The machine's load before this process added to it: what else was running."""
    return round(os.getloadavg()[0], 2)


def provenance(device: str) -> dict[str, object]:
    """The columns that say where and when."""
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": machine_name(device),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load": load_at_start(),
        "torch": torch.__version__,
    }
