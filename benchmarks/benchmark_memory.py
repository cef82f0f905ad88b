"""Peak memory for each length, and the largest batch that fits a given memory: unfused attention against ours.

The search does not exhaust memory to find its end: it measures batch 1 and 2, then the batch that the line through
the last two measurements puts just within the budget (at most eight times the largest that fitted), and so on until
the next one would be beyond. What it answers was measured and fits. A batch takes its inputs (q, k, v and, for a
backward, d_o) and the call's peak.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from tqdm import tqdm

from tests.cases import Case

from . import machine, plots
from .arguments import add_measuring, announce, impls_of, parse, parser, say_written
from .implementations import present
from .measure import Skipped, failures_in, measure_all, require_device, require_memory, write_csv
from .memory import available_bytes, peak_bytes
from .problem import Problem
from .tables import print_batches, print_results

CSV, BATCH_CSV = "memory.csv", "memory_batch.csv"
_PASSES = ("fwd", "fwd+bwd")
_IMPLS = {
    "cpu": ["naive", "fused", "torch_flash", "torch_unfused"],
    "cuda": ["fused", "tensor_core", "hopper", "torch_flash", "torch_math", "torch_unfused", "megatron"],
}
_LENGTHS = {"cpu": [128, 256, 512, 1024, 2048, 4096], "cuda": [512, 1024, 2048, 4096, 8192, 16384]}
_BASE = "torch_unfused"  # what the others are held against
_GROWTH = 8  # of the batch from one measurement to the next
_MAX_BATCH = 8192


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser("Measures peak memory for each length, and finds the largest batch that fits a memory budget.")
    add_measuring(p, 180, "our fast kernels, torch_flash and the unfused ones", memory_option=False)
    p.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="L",
        help="for the memory of one call (default: 128 … 4096 on a CPU, 512 … 16384 on CUDA)",
    )
    p.add_argument(
        "--batch-lengths",
        type=int,
        nargs="*",
        default=[512, 1024, 2048],
        metavar="L",
        help="for the largest batch (default: 512 1024 2048)",
    )
    p.add_argument(
        "--memory-budget",
        type=float,
        metavar="GIB",
        help="that a batch must fit (default: 0.5 on a CPU, 16 on CUDA; at most half of what is available)",
    )
    p.add_argument("--heads", type=int, help="of one call (default: 8 on a CPU, 32 on CUDA)")
    p.add_argument("--batch-heads", type=int, default=8, metavar="HEADS", help="of the largest batch (default: 8)")
    p.add_argument("--head-dim", type=int, default=64, help="default: 64")
    args = parse(p, arguments)
    announce(args, "Memory")
    impls = impls_of(args, present(_IMPLS[args.kind], args.kind))

    def problems(lengths: Sequence[int], heads: int) -> list[Problem]:
        sizes = {"head_dim": args.head_dim, "batch": 1, "heads_q": heads, "causal": True}
        cases = [Case(args.dtype, **sizes, seqlen_q=length, seqlen_k=length) for length in lengths]
        return [Problem(case, direction, args.device) for case in cases for direction in _PASSES]

    calls = problems(args.lengths or _LENGTHS[args.kind], args.heads or (8 if args.kind == "cpu" else 32))
    frame = measure_all(calls, impls, budget=args.budget / 2, with_time=False)
    print_results(frame, "Peak memory of a call", memory_base=_BASE)
    budget = (args.memory_budget or (0.5 if args.kind == "cpu" else 16)) * 2**30
    batches = largest_batches(problems(args.batch_lengths, args.batch_heads), impls, budget, args.budget / 2)
    print_batches(batches, _BASE)
    written = [write_csv(frame, args.output / CSV), write_csv(batches, args.output / BATCH_CSV)]
    say_written([*written, *plot(frame, args.output), *plot_batches(batches, args.output)])


def largest_batches(
    problems: Sequence[Problem], impls: Sequence[str], budget: float, seconds: float
) -> pandas.DataFrame:
    """A row for each problem and implementation: the largest batch within `budget` bytes, and the bytes it takes."""
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + seconds
    work = [(problem, impl) for problem in problems for impl in impls]
    for problem, impl in (progress := tqdm(work, unit="search", dynamic_ncols=True)):
        progress.set_description(f"largest batch, {problem.direction} {problem.case.id} {impl}")
        row = problem.columns() | {
            "impl": impl,
            "largest_batch": math.nan,
            "total_bytes": math.nan,
            "budget_bytes": budget,
        }
        row |= machine.provenance(problem.device) | {"status": "ok"}
        with failures_in(row):
            if time.monotonic() > deadline:
                raise Skipped(f"skipped: the budget of {seconds:.0f} s is used up")
            require_device(problem.device)
            require_memory(problem, impl)
            row["budget_bytes"] = min(budget, available_bytes(problem.device) / 2)
            row["largest_batch"], row["total_bytes"] = _largest_batch(problem, impl, row["budget_bytes"])
        rows.append(row)
    return pandas.DataFrame(rows).drop(columns="batch")


def _largest_batch(problem: Problem, impl: str, budget: float) -> tuple[int, float]:
    def total_bytes(batch: int) -> float:
        sized = dataclasses.replace(problem, case=dataclasses.replace(problem.case, batch=batch))
        return sized.inputs_bytes + peak_bytes(sized, impl)

    measured = [(1, total_bytes(1)), (2, total_bytes(2))]
    if math.isnan(measured[0][1]):
        raise ValueError("this system does not tell a process its peak memory")
    largest, too_large = (0, 0.0), _MAX_BATCH
    while True:
        for batch, size in measured:
            if size > budget:
                too_large = min(too_large, batch)
            elif batch > largest[0]:
                largest = (batch, size)
        (batch0, size0), (batch1, size1) = measured[-2:]
        slope = (size1 - size0) / (batch1 - batch0)
        guess = int(batch1 + (budget - size1) / slope) if slope > 0 else too_large
        guess = min(guess, largest[0] * _GROWTH, too_large - 1)
        if guess <= largest[0]:
            return largest
        measured.append((guess, total_bytes(guess)))


def plot(frame: pandas.DataFrame, folder: Path) -> list[Path]:
    fig, panels = plots.figure(1, 2, title=plots.what(frame, "Peak memory of a call"))
    for axes, direction in zip(panels, _PASSES, strict=True):
        plots.memory(axes, frame[frame["pass"] == direction], "seqlen_q", "length")
        axes.set_title(plots.PASS_TITLES[direction])
    return [plots.save(fig, folder / "memory.png")]


def plot_batches(batches: pandas.DataFrame, folder: Path) -> list[Path]:
    budget = f"{batches['budget_bytes'].max() / 2**30:.3g} GiB"
    fig, panels = plots.figure(1, 2, title=plots.what(batches, f"Largest batch in {budget}"))
    for axes, direction in zip(panels, _PASSES, strict=True):
        rows = batches[batches["pass"] == direction]
        plots.lines(axes, rows, "seqlen_q", "largest_batch", log_y=True, ylabel="largest batch", xlabel="length")
        axes.set_title(plots.PASS_TITLES[direction])
    return [plots.save(fig, folder / "memory_batch.png")]


if __name__ == "__main__":
    main()
