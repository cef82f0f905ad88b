"""Time of calls, taken turn by turn (A B A B …), so that what disturbs the machine disturbs all of them alike.

On the CPU a sample is one call by the wall clock. On CUDA it is one call between two events after a flush of the L2
cache; a call shorter than GRAPH_BELOW_MS is captured GRAPH_CALLS times in a CUDA graph, whose replay is one sample,
so that nobody's launch cost counts (the cache is then flushed once a replay). Reported are the median, the smallest
and the largest sample.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

WARM_UP_CALLS = 5
MIN_SAMPLES, GOOD_SAMPLES, MAX_SAMPLES = 3, 20, 500
MIN_SECONDS = 0.1  # a call that has GOOD_SAMPLES goes on for so long
GRAPH_BELOW_MS, GRAPH_CALLS = 0.2, 20
FLUSHES = 10  # as many as keep the device busy while the host queues the call, autograd included

Sampler = Callable[[], float]  # -> ms of one call


class Timed(Protocol):
    """What is timed: call.Call, cache_problem.CacheCall."""

    on_cuda: bool
    can_be_captured: bool
    context: Callable[[], AbstractContextManager[Any]]  # to be called within

    def __call__(self) -> object: ...


@dataclasses.dataclass(frozen=True)
class Timing:
    ms: float  # median
    ms_min: float
    ms_max: float
    samples: int
    timer: str  # "clock", "events" or "graph"


@functools.cache
def use_device(device: str) -> None:
    """CUDA work goes to a stream of its own from here on: the default stream cannot be captured in a graph."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)
        torch.cuda.set_stream(torch.cuda.Stream())


def time_calls(calls: Mapping[str, Timed], seconds: float) -> dict[str, Timing | Exception]:
    """Each call (run before, once) is sampled for `seconds`, what is around the timed region included, or until
    GOOD_SAMPLES are in; at least MIN_SAMPLES are.

    A call that raises (out of memory beside the others, say) has its exception in place of its time.
    """
    every = {name: _Samples(call, seconds) for name, call in calls.items()}
    while running := [samples for samples in every.values() if not samples.are_enough]:
        for samples in running:
            samples.take()
    return {name: samples.result for name, samples in every.items()}


class _Samples:
    """The samples of one call."""

    def __init__(self, call: Timed, seconds: float) -> None:
        self._call, self._seconds = call, seconds
        self._ms: list[float] = []
        self._spent_s = 0.0
        self._error: Exception | None = None
        self._sampler: Sampler | None = None
        self._timer = ""

    def take(self) -> None:
        try:
            if self._sampler is None:
                self._warm_up()
            start = time.perf_counter()
            self._ms.append(self._sampler())
            self._spent_s += time.perf_counter() - start
        except (RuntimeError, MemoryError) as error:
            self._error = error

    def _warm_up(self) -> None:
        on_cuda = self._call.on_cuda
        self._timer = "events" if on_cuda else "clock"
        self._sampler = functools.partial(_events if on_cuda else _clock, self._call)
        spent = [self._sampler()]
        if spent[0] > self._seconds / 4 * 1e3:  # so long a call is warm from its check
            self._ms, self._spent_s = spent, spent[0] / 1e3
        while len(spent) < WARM_UP_CALLS and sum(spent) < self._seconds / 4 * 1e3:
            spent.append(self._sampler())
        if on_cuda and self._call.can_be_captured and min(spent) < GRAPH_BELOW_MS:
            try:
                self._timer, self._sampler = "graph", functools.partial(_replay, _capture(self._call))
            except RuntimeError:  # what a graph forbids, such as waiting for the device: timed with its launch cost
                self._timer = "events"
                torch.cuda.synchronize()

    @property
    def are_enough(self) -> bool:
        count, spent = len(self._ms), self._spent_s
        if self._error or count < MIN_SAMPLES:
            return self._error is not None
        return spent >= self._seconds or count >= MAX_SAMPLES or (count >= GOOD_SAMPLES and spent >= MIN_SECONDS)

    @property
    def result(self) -> Timing | Exception:
        ms = self._ms
        return self._error or Timing(statistics.median(ms), min(ms), max(ms), len(ms), self._timer)


def _clock(call: Timed) -> float:
    with call.context():
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


def _events(call: Timed) -> float:
    with call.context():
        return _between_events(call)


def _between_events(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(FLUSHES):
        _flush_buffer(torch.cuda.current_device()).zero_()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def _flush_buffer(device: int) -> torch.Tensor:
    """Writing it replaces everything in the L2 cache."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device)


def _capture(call: Timed) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with call.context(), torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(GRAPH_CALLS):
            call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    return _between_events(graph.replay) / GRAPH_CALLS
