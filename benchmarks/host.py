"""What a call costs on the host: all but the computing, of which there is next to nothing. Ours beside PyTorch's SDPA.

On the CPU the wall clock of a tiny call on one thread, its kernel included. On CUDA the time to queue the call: the
device is waited for between batches alone, and a batch is too short to fill its queue.
"""

from __future__ import annotations

import functools
import math
import statistics
import timeit
import warnings
from collections.abc import Sequence

import pandas
import torch
import torch.nn.functional as F
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.cases import Case

from . import machine
from .arguments import announce, parse, parser, say_written
from .call import Call
from .checking import Oracle
from .implementations import Implementation, find
from .measure import Skipped, failures_in, require_device, write_csv
from .problem import Problem
from .tables import CONSOLE

CSV = "host.csv"
COLUMNS = [
    *("pass", "dtype", "batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "causal", "impl"),
    *("us", "us_min", "us_max", "ratio", "max_error", "commit", "date"),
    *("status", "batches", "calls", "machine", "device", "threads", "load", "torch"),
]
DEFAULT = "torch_default"  # SDPA as a model calls it: what ratios are over
_CALLS = {"cpu": 300, "cuda": 25}  # a batch; on CUDA some hundred launches, of about a thousand that the queue holds
_WARM_UP_BATCHES = 3


def _sdpa(name: str, *backend: SDPBackend) -> Implementation:
    context = {"context": functools.partial(sdpa_kernel, *backend)} if backend else {}
    return Implementation(name, F.scaled_dot_product_attention, **context)  # nothing of ours around it


def _implementations() -> list[Implementation]:
    return [
        find("auto"),
        find("fused"),
        _sdpa(DEFAULT),
        _sdpa("torch_flash", SDPBackend.FLASH_ATTENTION),
        _sdpa("torch_cudnn", SDPBackend.CUDNN_ATTENTION),
        _sdpa("torch_efficient", SDPBackend.EFFICIENT_ATTENTION),
        _sdpa("torch_math", SDPBackend.MATH),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser("Measures the host time of a call, forward and forward with backward.")
    p.add_argument(
        "--batches", type=int, default=21, metavar="N", help="timed, of which the median counts (default: 21)"
    )
    args = parse(p, arguments)
    if args.kind == "cpu" and not args.threads:
        torch.set_num_threads(1)
    announce(args, "Host time of a call")
    case = Case(args.dtype, head_dim=16, batch=1, heads_q=1, seqlen_q=8, seqlen_k=8)
    problems = [Problem(case, direction, args.device) for direction in ("fwd", "fwd+bwd")]
    frame = pandas.concat([measure(problem, args.batches) for problem in problems])
    show(frame)
    say_written([write_csv(frame, args.output / CSV)])


def measure(problem: Problem, batches: int) -> pandas.DataFrame:
    """A row for each implementation, in COLUMNS."""
    rows = {
        implementation: {**problem.columns(), "impl": implementation.name, **machine.provenance(problem.device)}
        for implementation in _implementations()
    }
    try:
        require_device(problem.device)
    except Skipped as reason:
        return pandas.DataFrame([row | {"status": str(reason)} for row in rows.values()], columns=COLUMNS)
    inputs = problem.inputs()
    oracle = Oracle(problem, inputs)
    calls: dict[str, Call] = {}
    with warnings.catch_warnings():  # PyTorch warns why a backend refuses; the row's status says that it did
        warnings.simplefilter("ignore", UserWarning)
        for implementation, row in rows.items():
            with failures_in(row):
                call = Call(implementation, problem, inputs)
                verdict = oracle.check(call)
                row |= {"max_error": verdict.error, "status": verdict.status}
                if not verdict.is_wrong:
                    calls[implementation.name] = call
    count = _CALLS[problem.device.split(":")[0]]
    samples: dict[str, list[float]] = {}
    for n in range(_WARM_UP_BATCHES + batches):  # turn by turn, so that what disturbs the machine disturbs all alike
        for name, call in calls.items():
            us = _batch(call, count)
            if n >= _WARM_UP_BATCHES:
                samples.setdefault(name, []).append(us)
    default = statistics.median(samples.get(DEFAULT, [math.nan]))
    for row in rows.values():
        if us := samples.get(row["impl"]):
            row |= {"us": statistics.median(us), "us_min": min(us), "us_max": max(us)}
            row |= {"ratio": row["us"] / default, "batches": batches, "calls": count}
    return pandas.DataFrame(rows.values(), columns=COLUMNS)


def _batch(call: Call, count: int) -> float:
    """Microseconds of one call."""
    with call.context():
        seconds = timeit.timeit(call, number=count)  # without garbage collection
    if call.on_cuda:
        torch.cuda.synchronize()
    return seconds / count * 1e6


def show(frame: pandas.DataFrame) -> None:
    """A row each, a block for each pass."""
    table = Table(title="Host time of a call", title_justify="left")
    for column in ("pass", "impl", "us", "min", "max", f"of {DEFAULT}", "status"):
        table.add_column(column, justify="left" if column in ("pass", "impl", "status") else "right")
    for direction, rows in frame.groupby("pass", sort=False):
        for n, row in enumerate(rows.itertuples()):
            numbers = (row.us, row.us_min, row.us_max)
            table.add_row(
                direction if n == 0 else "",
                row.impl,
                *("" if x != x else f"{x:.1f}" for x in numbers),
                "" if row.ratio != row.ratio else f"{row.ratio:.2f}x",
                "" if row.status == "ok" else f"[yellow]{row.status}[/]",
                end_section=n == len(rows) - 1,
            )
    CONSOLE.print(table)


if __name__ == "__main__":
    main()
