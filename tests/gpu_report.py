"""A pytest plugin (python -m pytest -p tests.gpu_report) that records a run on a GPU, which most machines do not have.

It writes tests/gpu_report.json: what passed, on what, and the tested sources as git would name them, so that
`git rev-parse <commit>:csrc` tells whether a commit is what was tested. No git is needed where it runs.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import hashlib
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPORT = Path(__file__).with_name("gpu_report.json")
FOLDERS = ("csrc", "flash_attention")
OUTCOMES = {"passed": "passed", "failed": "failed", "skipped": "skipped", "errors": "error", "xfailed": "xfailed"}

_start = time.monotonic()


def git_tree(folder: Path) -> str:
    """The hash that git gives the folder's files as they are, those left out that .gitignore names."""
    patterns = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]

    def hashed(kind: str, content: bytes) -> bytes:
        return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).digest()

    def tree(path: Path) -> bytes:
        entries = []
        for child in path.iterdir():
            if any(fnmatch.fnmatch(child.name, pattern) for pattern in patterns):
                continue
            if not child.is_dir():  # every file of ours has this mode
                entries.append((child.name, b"100644", hashed("blob", child.read_bytes())))
            elif content := tree(child):
                entries.append((child.name + "/", b"40000", hashed("tree", content)))
        entries.sort()  # as git does, a folder's name ends in a slash
        return b"".join(mode + b" " + name.rstrip("/").encode() + b"\0" + sha for name, mode, sha in entries)

    return hashed("tree", tree(folder)).hex()


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails or does not exist."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    return None


def report(counts: dict[str, int], duration_s: float) -> dict[str, Any]:
    import torch  # not before conftest.py has set the environment

    has_gpu = torch.cuda.is_available()
    tree = {name: git_tree(ROOT / name) for name in FOLDERS}
    return {
        **counts,
        "duration_s": round(duration_s, 1),
        "device": torch.cuda.get_device_name() if has_gpu else None,
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if has_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "tree": tree,
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """At the end of a run; with several processes, in the one that gathers their results."""
    counts = {name: len(terminalreporter.stats.get(outcome, ())) for name, outcome in OUTCOMES.items()}
    REPORT.write_text(json.dumps(report(counts, time.monotonic() - _start), indent=2) + "\n")
    terminalreporter.write_line(f"{REPORT.relative_to(ROOT)} written")
