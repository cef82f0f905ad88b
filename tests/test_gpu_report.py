"""The record of the last run on a GPU is complete, and says that everything passed."""

import datetime
import json

import pytest

from . import gpu_report
from .gpu_report import FOLDERS, OUTCOMES, REPORT, ROOT


def assert_complete(report: dict[str, object]) -> None:
    assert report.keys() == {
        *OUTCOMES, "duration_s", "device", "compute_capability", "driver", "cuda", "torch", "python", "date", "tree",
    }  # fmt: skip
    assert all(isinstance(report[name], int) and report[name] >= 0 for name in OUTCOMES)
    assert report["duration_s"] >= 0
    assert datetime.datetime.fromisoformat(report["date"]).utcoffset() == datetime.timedelta(0)
    assert all(len(bytes.fromhex(report["tree"][name])) == 20 for name in FOLDERS)


def test_a_report_is_complete() -> None:
    counts = dict.fromkeys(OUTCOMES, 1)
    assert_complete(json.loads(json.dumps(gpu_report.report(counts, 1.0))))


@pytest.mark.skipif(not REPORT.exists(), reason="no run on a GPU is recorded")
def test_the_recorded_run_passed() -> None:
    report = json.loads(REPORT.read_text())
    assert_complete(report)
    assert report["passed"] > 0 and report["failed"] == report["errors"] == 0
    assert report["device"] and report["cuda"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_hash_of_the_files_is_git_s_own(folder: str) -> None:
    status = gpu_report._output("git", "status", "--porcelain", "--", folder)
    if status is None or status:
        pytest.skip("not a checkout, or one with changes")
    assert gpu_report.git_tree(ROOT / folder) == gpu_report._output("git", "rev-parse", f"HEAD:{folder}")
