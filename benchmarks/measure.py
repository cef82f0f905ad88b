"""Problems times implementations -> one table: checked, timed, memory measured, or a status that says why not."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas
import torch
from tqdm import tqdm

from . import machine
from .cache_problem import CacheProblem
from .call import Call
from .checking import Oracle, Verdict
from .implementations import find
from .memory import available_bytes, peak_bytes
from .problem import Problem, options
from .timing import Timing, time_calls, use_device

COLUMNS = [
    *("pass", "dtype", "batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "causal", "impl"),
    *("ms", "ms_min", "ms_max", "tflops", "gbs", "peak_bytes", "max_error", "commit", "date"),
    *("status", "workspace_bytes", "samples", "timer", "machine", "device", "threads", "load", "torch"),
]
SHAPE = COLUMNS[:9]

_TIMED_SHARE = 0.6  # of the budget; the rest is for checks and memory
_SCORE_COPIES = {
    "fwd": 3,
    "decode": 3,
    "bwd": 6,
    "fwd+bwd": 6,
}  # score matrices that unfused attention holds at its peak


P = TypeVar("P", Problem, CacheProblem)


class Skipped(Exception):
    """Why a problem is not tried; a row's status."""


def measure_all(
    problems: Sequence[Problem],
    impls: Sequence[str],
    *,
    budget: float,
    with_memory: bool = True,
    with_time: bool = True,
) -> pandas.DataFrame:
    """Every implementation on every problem, a row each in COLUMNS, within about `budget` seconds.

    What is left of the budget is shared by what is left to do; once it is used up, problems become rows with a status.
    """
    rows: list[dict[str, Any]] = []
    for problem, share in shares(problems, budget):
        seconds = share / len(impls)
        try:
            with trying(problem.device, share, budget):
                rows += _measure(problem, impls, seconds if with_time else None, with_memory)
        except Skipped as reason:
            rows += [_row(problem, impl, status=str(reason)) for impl in impls]
    return pandas.DataFrame(rows, columns=COLUMNS)


def shares(problems: Sequence[P], budget: float) -> Iterator[tuple[P, float]]:
    """Each problem and the seconds that it may be timed for: its share of what is left, 0 once nothing is."""
    deadline = time.monotonic() + budget
    machine.load_at_start()
    progress = tqdm(problems, unit="problem", dynamic_ncols=True)
    for done, problem in enumerate(progress):
        progress.set_description(f"{problem.id:.60}")
        yield problem, _TIMED_SHARE * max(0.0, deadline - time.monotonic()) / (len(problems) - done)


@contextlib.contextmanager
def trying(device: str, seconds: float, budget: float) -> Iterator[None]:
    """Around the work on a problem that has `seconds` of the budget: raises Skipped where it cannot be tried."""
    if seconds <= 0:
        raise Skipped(f"skipped: the budget of {budget:.0f} s is used up")
    require_device(device)
    with warnings.catch_warnings():  # PyTorch warns why a backend refuses; the row's status says that it did
        warnings.simplefilter("ignore", UserWarning)
        yield


def write_csv(frame: pandas.DataFrame, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")
    return path


def require_device(device: str) -> None:
    """Makes the device ready for work, or raises Skipped."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Skipped("unavailable: no CUDA device, or a torch without CUDA")
    use_device(device)


def _measure(problem: Problem, impls: Sequence[str], seconds: float | None, with_memory: bool) -> list[dict[str, Any]]:
    inputs = problem.inputs()
    oracle = Oracle(problem, inputs)
    rows = {impl: _row(problem, impl) for impl in impls}

    def call_of(impl: str) -> Call:
        require_memory(problem, impl)
        call = Call(find(impl), problem, inputs)
        rows[impl]["workspace_bytes"] = _workspace_bytes(problem, impl, inputs)
        return call

    calls = checked_calls(rows, call_of, oracle.check)
    timings = {} if seconds is None else timings_of(calls, seconds, rows)
    for impl, timing in timings.items():
        rows[impl] |= {"ms": timing.ms, "ms_min": timing.ms_min, "ms_max": timing.ms_max, "samples": timing.samples}
        rows[impl] |= {"timer": timing.timer, "tflops": problem.flops / timing.ms * 1e-9}
        if problem.case.seqlen_q == 1:
            rows[impl]["gbs"] = problem.kv_bytes / timing.ms * 1e-6
    timed = list(calls)
    calls.clear()  # their graphs and score matrices
    for impl in timed if with_memory else ():
        with failures_in(rows[impl]):
            rows[impl]["peak_bytes"] = peak_bytes(problem, impl)
    return list(rows.values())


def checked_calls(
    rows: dict[str, dict[str, Any]], call_of: Callable[[str], Any], check: Callable[[Any], Verdict]
) -> dict[str, Any]:
    """The calls, by implementation, whose results are not wrong; error and status, of all, are written to the rows."""
    calls = {}
    for impl, row in rows.items():
        with failures_in(row):
            call = call_of(impl)
            verdict = check(call)
            row |= {"max_error": verdict.error, "status": verdict.status}
            if not verdict.is_wrong:
                calls[impl] = call
    return calls


def timings_of(calls: dict[str, Any], seconds: float, rows: dict[str, dict[str, Any]]) -> dict[str, Timing]:
    """time_calls() of those that did not raise; of the others the reason is written to the rows."""
    timings = {}
    for impl, timing in time_calls(calls, seconds).items():
        with failures_in(rows[impl]):
            if isinstance(timing, Exception):
                raise timing
            timings[impl] = timing
    return timings


def _row(problem: Problem, impl: str, **fields: Any) -> dict[str, Any]:
    return problem.columns() | {"impl": impl} | machine.provenance(problem.device) | fields


@contextlib.contextmanager
def failures_in(row: dict[str, Any]) -> Iterator[None]:
    """What an implementation raises becomes the row's status."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        row["status"] = f"out of memory: {_first_line(error)}"
    except Skipped as error:
        row["status"] = str(error)
    except (ValueError, TypeError, RuntimeError) as error:
        row["status"] = f"unavailable: {_first_line(error)}"
    except Exception as error:  # compilers raise all sorts; the other rows are kept
        row["status"] = f"unavailable: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removesuffix(" Aborting execution.")


def require_memory(problem: Problem, impl: str) -> None:
    """On a CPU, running out of memory ends other people's processes: what would come near is not started."""
    needed = find(impl).stores_scores * _SCORE_COPIES[problem.direction] * problem.scores_bytes
    if problem.device == "cpu" and needed > (available := available_bytes("cpu")) / 2:
        raise Skipped(f"skipped: its scores need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available")


def _workspace_bytes(problem: Problem, impl: str, inputs: Any) -> float:
    """What our kernel says it needs; NaN for a peer."""
    if not find(impl).is_ours:
        return math.nan
    from flash_attention import workspace_bytes

    return workspace_bytes(*inputs.args[:3], backward=problem.needs_grad, impl=impl, **options(inputs))
