"""Peak memory of one call beyond its inputs, its results included. Of a backward, what its forward kept is an input.

CUDA: the peak of torch's allocator, which every implementation here allocates from. What an implementation keeps from
one call to the next (Implementation.release) is given back before, so that the measured call allocates and counts it.

CPU: the peak of the process's resident memory (VmHWM, reset through /proc/self/clear_refs) above what was resident
before the call. It counts what is really touched, whoever allocates it: torch, MKL or us. It is measured in a process
of its own, whose MKL gives its buffers back after each call, after the C heap was trimmed, so that no call hides in
what an earlier one left. What is read first by a call (code pages, thread stacks) is kept out by a small call before
it (a whole one of what compiles for each size) and by the smallest of up to three readings. Resolution: about 0.2 MB.
Where the system has no /proc/self/clear_refs the answer is NaN.
"""

from __future__ import annotations

import concurrent.futures.process
import contextlib
import ctypes
import dataclasses
import functools
import multiprocessing
import os
import re
import time
from pathlib import Path

import torch

from .call import Call
from .implementations import find
from .problem import Problem

_CLEAR_REFS = Path("/proc/self/clear_refs")
_REPEAT_SECONDS = 0.5


def peak_bytes(problem: Problem, impl: str) -> float:
    """Raises what the implementation raises, and MemoryError if the measuring process was killed."""
    if problem.device != "cpu":
        return _peak_bytes(problem, impl)
    try:
        return _worker(torch.get_num_threads()).submit(_peak_bytes, problem, impl).result()
    except concurrent.futures.process.BrokenProcessPool as error:
        _worker.cache_clear()
        raise MemoryError("the measuring process was killed") from error


@functools.cache
def _worker(threads: int) -> concurrent.futures.Executor:
    """The process that measures memory on the CPU; it lives until this one ends."""
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, spawn, _start_worker, (threads,))


def _start_worker(threads: int) -> None:
    os.environ["MKL_DISABLE_FAST_MM"] = "1"  # read at MKL's first allocation
    torch.set_num_threads(threads)


def _peak_bytes(problem: Problem, impl: str) -> float:
    """In this process."""
    implementation = find(impl)
    call = Call(implementation, problem, problem.inputs())
    first = call
    if not implementation.compiles:  # for each size anew, so that a small call would warm nothing
        small = _small(problem)
        first = Call(implementation, small, small.inputs())
    with call.context():
        first()
        implementation.release()
        return _peak_cuda(call) if problem.device.startswith("cuda") else _peak_cpu(call)


def _small(problem: Problem) -> Problem:
    case = problem.case
    seqlen_q = min(64, case.seqlen_q)
    lengths = {"lengths_q": case.lengths_q and (seqlen_q,), "lengths_k": case.lengths_k and (64,)}
    small = dataclasses.replace(case, batch=1, seqlen_q=seqlen_q, seqlen_k=64, **lengths)
    return dataclasses.replace(problem, case=small)


def _peak_cuda(call: Call) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(call: Call) -> float:
    if not os.access(_CLEAR_REFS, os.W_OK):
        return float("nan")
    readings: list[float] = []
    start = time.perf_counter()
    while not readings or (len(readings) < 3 and time.perf_counter() - start < _REPEAT_SECONDS):
        with contextlib.suppress(AttributeError):  # a C library without it gives memory back by itself
            ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text("5")  # VmHWM = VmRSS
        before = _status_bytes("VmRSS")
        call()
        readings.append(max(0, _status_bytes("VmHWM") - before))
    return min(readings)


def _status_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def available_bytes(device: str) -> float:
    """What the device could still allocate; on a CPU what the system can give without swapping."""
    if device.startswith("cuda"):  # torch's allocator keeps what was freed
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return 1024 * int(found[1]) if found else float("inf")
