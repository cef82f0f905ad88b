"""Every instruction set that this machine has gives correct results; naming another is one clear ValueError."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attention import _C

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
BEST = os.environ.get("FLASH_ATTENTION_ISA") or _C.cpu_isa()
AVAILABLE = ISAS[: ISAS.index(BEST) + 1]
ROOT = Path(__file__).parent.parent

# Runs in a process of its own, since the choice is made once. Every case against the oracle, and so against each other.
CHECK = """
import sys
from flash_attention import _C
from tests import cache_checks
from tests.cache_table import CASES as CACHE_CASES
from tests.checks import assert_correct, run
from tests.table import CASES
assert _C.cpu_isa() == sys.argv[1], _C.cpu_isa()
failures = []
for case in CASES[::2]:
    for impl in ("naive", "fused"):
        try:
            assert_correct(run(case.inputs(), impl), case)
        except Exception as error:
            failures.append(f"{impl} {error}")
for case in CACHE_CASES:
    arguments = case.inputs()
    try:
        cache_checks.assert_correct(cache_checks.run(arguments, "fused"), case)
        cache_checks.assert_caches_correct(case, arguments)
    except Exception as error:
        failures.append(f"fused {case.id} {error}")
print("\\n".join(failures))
sys.exit(bool(failures))
"""


def python(code: str, *arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FLASH_ATTENTION_ISA": isa, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("isa", ISAS)
def test_results_are_correct(isa: str) -> None:
    if isa not in AVAILABLE:
        pytest.skip(f"this machine has no {isa}")
    if isa == BEST:
        pytest.skip("every other test runs with it")
    done = python(CHECK, isa, isa=isa)
    assert done.returncode == 0, done.stdout + done.stderr


def refusal(isa: str) -> str:
    """What a call says with that environment: the last line of its traceback."""
    call = "from flash_attention import flash_attention; import torch; flash_attention(*[torch.ones(1, 1, 2, 4)] * 3)"
    done = python(call, isa=isa)
    assert done.returncode == 1, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    words = refusal("sse2")
    assert words.startswith("ValueError: FLASH_ATTENTION_ISA=sse2: no such instruction set")
    assert all(isa in words for isa in AVAILABLE)


def test_more_than_the_machine_has_is_refused() -> None:
    if AVAILABLE == ISAS:
        pytest.skip("this machine has every instruction set")
    words = refusal(ISAS[len(AVAILABLE)])
    assert words.startswith("ValueError") and "more than this machine has" in words


def test_the_package_imports_and_prints_under_any_environment() -> None:
    for isa in (*AVAILABLE, "sse2"):
        done = python(
            "import flash_attention, runpy; runpy.run_module('flash_attention', run_name='__main__')", isa=isa
        )
        assert (isa in done.stdout) if isa in AVAILABLE else "FLASH_ATTENTION_ISA=sse2" in done.stderr
        assert "Traceback" not in done.stderr
