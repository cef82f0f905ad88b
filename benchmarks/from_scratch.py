"""What writing attention from scratch gains: our kernels beside PyTorch's unfused attention, 16384 tokens, float16.

H 16, D 128, (B, L) from (32, 512) to (1, 16384), forward. PyTorch's side is torch_math (its SDPA without a fused
kernel), torch_unfused (matmul, softmax, matmul) and megatron; from_scratch.csv has a row for each of our kernels, each
of these and each length; from_scratch.png shows time and speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pandas
from rich.table import Table

from tests.cases import Case

from . import plots
from .arguments import add_measuring, announce, impls_of, parse, parser, say_written
from .implementations import OURS, present
from .measure import measure_all, write_csv
from .problem import Problem
from .tables import CONSOLE, shape_texts

CSV = "from_scratch.csv"
_HEADS, _HEAD_DIM = 16, 128
_IMPLS = ["naive", "split", "fused", "auto", "torch_math", "torch_unfused", "megatron"]
_SIZES = {"batch": "B", "heads_q": "H", "seqlen_q": "L", "head_dim": "D"}
_RESULTS = ["ms", "tflops", "ms_min", "ms_max", "peak_bytes", "max_error", "status"]
_SHARED = ["pass", "dtype", "causal", "commit", "date", "machine", "device", "threads", "load", "torch"]


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser(__doc__)
    add_measuring(p, 120, " ".join(_IMPLS))
    lengths = [512, 1024, 2048, 4096, 8192, 16384]
    p.add_argument("--lengths", type=int, nargs="+", default=lengths, metavar="L", help="default: 512 … 16384")
    p.add_argument("--tokens", type=int, default=16384, help="B L (default: 16384)")
    p.add_argument("--causal", action="store_true", help="with the causal mask")
    args = parse(p, arguments)
    impls = impls_of(args, present(_IMPLS, args.kind))
    if len({name in OURS for name in impls}) < 2:
        p.error("--impl: name one of our kernels and one of PyTorch's attentions at least")
    announce(args, "From scratch")

    sizes = {"head_dim": _HEAD_DIM, "heads_q": _HEADS, "causal": args.causal}
    cases = [Case(args.dtype, **sizes, batch=max(1, args.tokens // n), seqlen_q=n, seqlen_k=n) for n in args.lengths]
    problems = [Problem(case, "fwd", args.device) for case in cases]
    pairs = pair(measure_all(problems, impls, budget=args.budget, with_memory=not args.no_memory))
    print_pairs(pairs)
    say_written([write_csv(pairs, args.output / CSV), *plot(pairs, args.output)])


def pair(frame: pandas.DataFrame) -> pandas.DataFrame:
    """measure's rows side by side, one of ours and one of PyTorch's for each length; ratio: PyTorch's time / ours."""
    by_impl = {impl: rows.reset_index(drop=True) for impl, rows in frame.groupby("impl", sort=False)}  # by length
    blocks = []
    for ours, pytorch in itertools.product(by_impl, by_impl):
        if ours in OURS and pytorch not in OURS:
            block = by_impl[ours][[*_SIZES]].rename(columns=_SIZES)
            for side, impl in (("pytorch", pytorch), ("ours", ours)):
                block[side] = impl
                for column in _RESULTS[:2]:
                    block[f"{side}_{column}"] = by_impl[impl][column]
            block["ratio"] = block["pytorch_ms"] / block["ours_ms"]
            for side, impl in (("pytorch", pytorch), ("ours", ours)):
                for column in _RESULTS[2:]:
                    block[f"{side}_{column}"] = by_impl[impl][column]
            blocks.append(block.join(by_impl[ours][_SHARED]))
    return pandas.concat(blocks, ignore_index=True)


def _as_rows(pairs: pandas.DataFrame) -> pandas.DataFrame:
    """A row for each implementation and length again, with measure's names."""
    sizes = {short: name for name, short in _SIZES.items()}
    sides = []
    for side in ("pytorch", "ours"):
        results = {f"{side}_{column}": column for column in _RESULTS}
        rows = pairs[[*sizes, side, *results, *_SHARED]].rename(columns={**sizes, **results, side: "impl"})
        sides.append(rows.drop_duplicates(["impl", "seqlen_q"]))
    rows = pandas.concat(sides, ignore_index=True)
    return rows.assign(heads_kv=rows["heads_q"], seqlen_k=rows["seqlen_q"])


def print_pairs(pairs: pandas.DataFrame) -> None:
    shared, _ = shape_texts(_as_rows(pairs))
    table = Table(title=f"From scratch: {shared}", title_justify="left")
    headings = (*_SIZES.values(), "PyTorch", "ms", "TFLOP/s", "ours", "ms", "TFLOP/s", "ratio", "status")
    for heading in headings:
        words = heading in ("PyTorch", "ours", "status")
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "status")
    for _, block in pairs.groupby(["ours", "pytorch"], sort=False):
        for n, row in enumerate(block.itertuples(), start=1):
            numbers = (row.pytorch_ms, row.pytorch_tflops, row.ours_ms, row.ours_tflops, row.ratio)
            ms, tflops, our_ms, our_tflops, ratio = ("" if x != x else f"{x:.3g}" for x in numbers)
            statuses = {row.pytorch: row.pytorch_status, row.ours: row.ours_status}
            table.add_row(
                *(str(getattr(row, name)) for name in _SIZES.values()),
                *(row.pytorch, ms, tflops, f"[bold]{row.ours}[/]", our_ms, our_tflops, ratio and f"{ratio}x"),
                "; ".join(f"{impl} {status}" for impl, status in statuses.items() if status != "ok"),
                end_section=n == len(block),
            )
    CONSOLE.print(table)


def plot(pairs: pandas.DataFrame, folder: Path) -> list[Path]:
    rows = _as_rows(pairs)
    mask = "causal" if rows["causal"].all() else "full"
    title = f"Forward, {mask}, H{_HEADS} D{_HEAD_DIM}, B L = {(rows['batch'] * rows['seqlen_q']).max()}"
    fig, (left, right) = plots.figure(1, 2, title=f"{title}\n{plots.where(rows)}")
    plots.time(left, rows, "seqlen_q", "length")
    plots.speed(right, rows, "seqlen_q", "length")
    return [plots.save(fig, folder / "from_scratch.png")]


if __name__ == "__main__":
    main()
