"""Attention of new tokens over a cache of keys and values, as a model generates them, beside PyTorch's SDPA.

Speed is the bytes of K and V read a second. bfloat16, D 128, Hq:Hkv 32:8, 32:32 and 64:8 on CUDA; smaller, and float32
too, on a CPU. A cache is full, and each of its sequences has one query, but as `layout` and other columns say:
token_major: (B, L, H, D) in memory; paged: pages of page_size tokens, shuffled; float8: the cache, not q; append: the
call stores the new token, rotated; mixed: lengths from 1/16 to all of seqlen_k. PyTorch's SDPA takes two whole tensors,
so that it stands beside contiguous and token_major alone. A cache smaller than the L2 is read from there where calls
are replayed from a CUDA graph. decode.csv has the columns heads_q … status, then the circumstances.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from rich.table import Table

from . import machine, plots
from .arguments import add_measuring, announce, impls_of, parse, parser, say_written
from .cache_checking import CacheOracle
from .cache_problem import CacheCall, CacheProblem
from .decode_cases import HEAD_DIM, LAYOUTS, cases
from .grid import geometric_mean, ratios_to_best_peer
from .implementations import OURS
from .measure import Skipped, checked_calls, shares, timings_of, trying, write_csv
from .problem import DTYPE_NAMES
from .tables import CONSOLE, shape_texts

CSV = "decode.csv"
COLUMNS = [
    *("heads_q", "heads_kv", "batch", "seqlen_k", "layout", "page_size", "impl", "us", "gbs", "max_error"),
    *("commit", "date", "dtype", "head_dim", "seqlen_q", "us_min", "us_max", "status"),
    *("samples", "timer", "machine", "device", "threads", "load", "torch"),
]
_SIZES = ["heads_q", "heads_kv", "batch", "seqlen_k", "dtype"]
_PROBLEM = [*_SIZES, "layout", "page_size", "head_dim", "seqlen_q"]
_BUDGET = {"cpu": 240.0, "cuda": 140.0}


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser(__doc__, dtype_option=False)
    add_measuring(p, 0, "auto and PyTorch's fused kernels", memory_option=False)
    p.set_defaults(budget=None)
    p.add_argument("--quick", action="store_true", help="the first heads, and one size with every layout")
    only = p.add_argument_group("which problems (default: all)")
    only.add_argument("--heads", nargs="+", metavar="HQ:HKV")
    only.add_argument("--batch", nargs="+", type=int, metavar="B")
    only.add_argument("--lengths", nargs="+", type=int, metavar="L", help="of the longest sequence")
    only.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    only.add_argument("--queries", nargs="+", type=int, metavar="L", help="new tokens of a sequence")
    only.add_argument("--head-dims", nargs="+", type=int, metavar="D")
    only.add_argument("--dtype", nargs="+", choices=DTYPE_NAMES, dest="dtypes")
    args = parse(p, arguments)
    problems = [CacheProblem(case, args.device) for case in cases(args.kind, quick=args.quick)]
    problems = [problem for problem in problems if _is_chosen(args, problem)]
    if not problems:
        p.error("there is no such problem")
    announce(args, "Decoding")

    frame = measure(problems, impls_of(args, []), args.budget or _BUDGET[args.kind])
    print_results(frame)
    say_written([write_csv(frame, args.output / CSV), *plot(frame, args.output)])


def _is_chosen(args: argparse.Namespace, problem: CacheProblem) -> bool:
    is_of = problem.columns()
    asked = {
        "batch": args.batch,
        "seqlen_k": args.lengths,
        "layout": args.layouts,
        "seqlen_q": args.queries,
        "head_dim": args.head_dims,
        "dtype": args.dtypes,
        "heads": args.heads,
    }
    is_of["heads"] = f"{is_of['heads_q']}:{is_of['heads_kv']}"
    return all(not values or is_of[name] in values for name, values in asked.items())


def measure(problems: Sequence[CacheProblem], impls: Sequence[str], budget: float) -> pandas.DataFrame:
    """A row for each problem and each of `impls`, or of what is usual for the problem, in COLUMNS."""
    rows: list[dict[str, Any]] = []
    for problem, seconds in shares(problems, budget):
        names = [name for name in impls or _usual(problem) if name in OURS or problem.has_peers]
        origin = machine.provenance(problem.device)
        of_problem = {name: problem.columns() | {"impl": name} | origin for name in names}
        try:
            with trying(problem.device, seconds, budget):
                _measure(problem, of_problem, seconds)
        except Skipped as reason:
            for row in of_problem.values():
                row["status"] = str(reason)
        rows += of_problem.values()
    return pandas.DataFrame(rows, columns=COLUMNS)


def _usual(problem: CacheProblem) -> tuple[str, ...]:
    """`auto` and the peers that are made for it: on CUDA, of several queries the one that needs no mask in memory."""
    case = problem.case
    if problem.device == "cpu":
        return ("auto", "torch_flash") if case.dtype == "f32" else ("auto", "torch_flash", "torch_flash_float32")
    if case.seqlen_q > 1:
        return "auto", "torch_flash"
    return ("auto", "torch_efficient", "torch_math") if case.dtype == "f32" else ("auto", "torch_cudnn", "torch_flash")


def _measure(problem: CacheProblem, rows: dict[str, dict[str, Any]], seconds: float) -> None:
    """Fills in the rows, by implementation."""
    inputs = problem.inputs()
    calls = checked_calls(rows, lambda impl: CacheCall(impl, problem, inputs), CacheOracle(problem, inputs).check)
    for impl, timing in timings_of(calls, seconds / max(1, len(calls)), rows).items():
        us = {"us": timing.ms * 1e3, "us_min": timing.ms_min * 1e3, "us_max": timing.ms_max * 1e3}
        rows[impl] |= us | {"gbs": problem.kv_bytes / timing.ms * 1e-6}
        rows[impl] |= {"samples": timing.samples, "timer": timing.timer}


def of_contiguous(frame: pandas.DataFrame) -> pandas.Series:
    """GB/s of each row / that of the same kernel for one query over the contiguous cache of the same sizes."""
    is_plain = (frame["layout"] == "contiguous") & (frame["head_dim"] == HEAD_DIM) & (frame["seqlen_q"] == 1)
    same = [frame[name] for name in [*_SIZES, "impl"]]
    return frame["gbs"] / frame["gbs"].where(is_plain).groupby(same).transform("max")


def print_results(frame: pandas.DataFrame) -> None:
    """A table for each dtype: a row for each problem, a column for each implementation, our ratio to the best peer."""
    for _, of_dtype in frame.groupby("dtype", sort=False):
        _print_table(of_dtype)
    ratios = _ratios(frame)
    if ratios.empty:
        return
    variants = _variants(ratios)
    kinds = ratios["dtype"] + " " + variants.where(variants.isin(LAYOUTS), "several queries, other head_dims")
    for kind, of_kind in ratios["ratio"].groupby(kinds, sort=False):
        mean, smallest = geometric_mean(of_kind), of_kind.min()
        CONSOLE.print(f"{kind}: geometric mean {mean:.2f}, smallest {smallest:.2f}, {len(of_kind)} problems")


def _print_table(frame: pandas.DataFrame) -> None:
    shared, problems = shape_texts(frame.assign(**{"pass": ""}))
    table = Table(
        title=f"us (GB/s): {shared}",
        title_justify="left",
        caption="of contiguous: our GB/s / those of one query over the contiguous cache; "
        "ratio: time of the best peer / our time",
        caption_justify="left",
    )
    for column in ("problem", "layout"):
        table.add_column(column, no_wrap=True)
    impls = frame["impl"].unique()
    for column in (*impls, "of contiguous", "ratio"):
        table.add_column(column, justify="right")
    ratios = _ratios(frame)
    frame = frame.assign(problem=problems, variant=_variants(frame), relative=of_contiguous(frame))
    for key, rows in frame.groupby(_PROBLEM, sort=False):
        cells = {row.impl: _cell(row) for row in rows.itertuples()}
        first, ratio = rows.iloc[0], ratios["ratio"].get(key)
        table.add_row(
            first["problem"],
            first["variant"],
            *(cells.get(impl, "") for impl in impls),
            "" if first["relative"] != first["relative"] else f"{first['relative']:.2f}",
            f"[{'green' if ratio >= 1 else 'yellow'}]{ratio:.2f}[/]" if ratio else "",
        )
    CONSOLE.print(table)


def _ratios(frame: pandas.DataFrame) -> pandas.DataFrame:
    """grid.ratios_to_best_peer(), by problem."""
    ratios = ratios_to_best_peer(frame.assign(ms=frame["us"] / 1000), _PROBLEM)
    return ratios.set_index(_PROBLEM, drop=False).rename_axis(index=lambda name: f"of_{name}")


def _cell(row: Any) -> str:
    """The time and the speed, or the first words of why there is none."""
    reason = row.status.split(":")[0]
    if row.us != row.us:
        return "–" if reason == "unavailable" else f"[yellow]{reason}[/]"
    text = f"{row.us:.4g} ({row.gbs:.4g})"
    if reason != "ok":
        return f"[yellow]{text} {reason}[/]"
    return f"[bold]{text}[/]" if row.impl in OURS else text


def _variants(frame: pandas.DataFrame) -> pandas.Series:
    """What varies, in a word or two."""

    def words(row: pandas.Series) -> str:
        paged = f"{row.layout} {row.page_size}" if row.page_size else row.layout
        varied = [f"{row.seqlen_q} queries"] * (row.seqlen_q > 1) + [f"D{row.head_dim}"] * (row.head_dim != HEAD_DIM)
        return " ".join([paged] * (not varied or paged != "contiguous") + varied)

    return frame.apply(words, axis=1)


def plot(frame: pandas.DataFrame, folder: Path) -> list[Path]:
    """Speeds on contiguous caches; what varies over the speed of the same kernel of ours there."""
    frame = frame.assign(variant=_variants(frame), relative=of_contiguous(frame), size=_size_texts(frame))
    is_plain = frame["variant"] == "contiguous"
    varied = frame[~is_plain & frame["impl"].isin(_first_of_ours(frame))].dropna(subset=["relative"])
    has_several = varied.groupby("size")["variant"].transform("nunique") > 1  # not token_major alone
    panels = [
        ("one query, contiguous cache", frame[is_plain], "size", "gbs", "K and V read, GB/s", "impl"),
        ("what varies", varied[has_several], "variant", "relative", "GB/s of contiguous", "size"),
    ]
    panels = [panel for panel in panels if len(panel[1])]
    title = f"Decoding: D{HEAD_DIM}, Hq:Hkv, batch, tokens in the cache\n{plots.where(frame)}"
    fig, both = plots.figure(max(1, len(panels)), 1, title=title, panel=(12.5, 3.5))
    for axes, (heading, rows, groups, y, ylabel, series) in zip(both, panels, strict=False):
        plots.bars(axes, rows, groups, y, ylabel=ylabel, series=series)
        axes.set_title(heading)
    return [plots.save(fig, folder / "decode.png")]


def _first_of_ours(frame: pandas.DataFrame) -> list[str]:
    return [impl for impl in frame["impl"].unique() if impl in OURS][:1]


def _size_texts(frame: pandas.DataFrame) -> pandas.Series:
    """Heads, batch and length; the dtype where it is not the usual one."""
    heads = frame["heads_q"].astype(str) + ":" + frame["heads_kv"].astype(str)
    sizes = heads + " B" + frame["batch"].astype(str) + " " + frame["seqlen_k"].map(plots.short)
    usual = frame["dtype"].mode()[0]
    return sizes + frame["dtype"].map(lambda dtype: "" if dtype == usual else f" {dtype}")


if __name__ == "__main__":
    main()
