"""Results as tables in the terminal."""

from __future__ import annotations

import sys

import pandas
from rich.console import Console
from rich.table import Table

from .implementations import OURS
from .measure import SHAPE

_WIDTH_OF_FILES = 160
CONSOLE = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)


def throughput(frame: pandas.DataFrame) -> tuple[pandas.Series, str]:
    """The frame's speeds and their unit, so that the numbers are readable."""
    if frame["tflops"].max() < 2:
        return frame["tflops"] * 1000, "GFLOP/s"
    return frame["tflops"], "TFLOP/s"


def base_over_each(frame: pandas.DataFrame, base: str, column: str) -> pandas.Series:
    """The value of `base` on the same problem / each row's; NaN where `base` has none."""
    of_base = frame[column].where(frame["impl"] == base).groupby([frame[name] for name in SHAPE]).transform("max")
    return of_base / frame[column]


def shape_texts(frame: pandas.DataFrame) -> tuple[str, pandas.Series]:
    """The problems in words: what all rows share, and for each row the rest."""
    heads, heads_kv = frame["heads_q"].astype(str), frame["heads_kv"].astype(str)
    lengths, lengths_k = frame["seqlen_q"].astype(str), frame["seqlen_k"].astype(str)
    parts = pandas.DataFrame(
        {
            "pass": frame["pass"],
            "dtype": frame["dtype"],
            "batch": "B" + frame["batch"].astype(str) if "batch" in frame else "",
            "heads": "H" + heads.where(heads == heads_kv, heads + ":" + heads_kv),
            "length": "L" + lengths.where(lengths == lengths_k, lengths + "x" + lengths_k),
            "head_dim": "D" + frame["head_dim"].astype(str),
            "mask": frame["causal"].map({True: "causal", False: "full"}) if "causal" in frame else "",
        }
    )
    shared = [name for name in parts if name != "length" and parts[name].nunique() == 1]
    return " ".join(filter(None, parts[shared].iloc[0])), parts.drop(columns=shared).agg(" ".join, axis=1)


def print_results(frame: pandas.DataFrame, title: str, base: str = "naive", memory_base: str | None = None) -> None:
    """A row each, a block a problem; speed-ups are over `base`, memory is held against that of `memory_base`."""
    speed, unit = throughput(frame)
    speedup, memory_ratio = base_over_each(frame, base, "ms"), base_over_each(frame, memory_base or "", "peak_bytes")
    used = {
        "ms": frame["ms"],
        unit: frame["ms"],
        "K+V GB/s": frame["gbs"],
        f"vs {base}": speedup,
        "extra MiB": frame["peak_bytes"],
        f"{memory_base} needs": memory_ratio,
        "error": frame["max_error"],
        "status": frame["status"].where(frame["status"] != "ok"),
    }
    columns = ["impl", *(column for column, values in used.items() if values.notna().any())]
    shared, problems = shape_texts(frame)
    table = Table(
        title=f"{title}: {shared}",
        title_justify="left",
        caption="extra MiB: peak memory beyond the inputs, results included; error: largest difference from float64",
        caption_justify="left",
    )
    table.add_column("problem", no_wrap=True)
    for column in columns:
        if column == "status":
            table.add_column(column, min_width=24)  # the one that gives way
        else:
            table.add_column(column, justify="left" if column == "impl" else "right", no_wrap=True)
    frame = frame.assign(problem=problems, speed=speed, speedup=speedup, memory_ratio=memory_ratio)
    for _, rows in frame.groupby(SHAPE, sort=False):
        for n, (_, row) in enumerate(rows.iterrows()):
            cells = {
                "impl": f"[bold]{row.impl}[/]" if row.impl in OURS else row.impl,
                "ms": _number(row.ms),
                unit: _number(row.speed),
                "K+V GB/s": _number(row.gbs),
                f"vs {base}": f"{row.speedup:.2f}x" if row.speedup == row.speedup else "",
                "extra MiB": _number(row.peak_bytes / 2**20),
                f"{memory_base} needs": f"{row.memory_ratio:,.1f}x" if row.memory_ratio == row.memory_ratio else "",
                "error": f"{row.max_error:.1e}" if row.max_error == row.max_error else "",
                "status": "" if row.status == "ok" else f"[yellow]{row.status}[/]",
            }
            table.add_row(row.problem if n == 0 else "", *(cells[c] for c in columns), end_section=n == len(rows) - 1)
    CONSOLE.print(table)


def print_batches(batches: pandas.DataFrame, base: str) -> None:
    """The largest batch of each implementation, and how many times that of `base`."""
    if batches.empty:
        return
    shared, problems = shape_texts(batches)
    table = Table(title=f"Largest batch that fits: {shared}", title_justify="left")
    for column in ("problem", "impl", "batch", f"of {base}", "uses MiB", "budget MiB", "status"):
        table.add_column(
            column, justify="left" if column in ("problem", "impl", "status") else "right", no_wrap=column != "status"
        )
    for _, rows in batches.assign(problem=problems).groupby([c for c in SHAPE if c in batches], sort=False):
        of_base = rows.loc[rows["impl"] == base, "largest_batch"].max()
        for n, (_, row) in enumerate(rows.iterrows()):
            ratio = f"{row.largest_batch / of_base:.1f}x" if of_base > 0 and row.largest_batch >= 0 else ""
            sizes = (_number(row.total_bytes / 2**20), _number(row.budget_bytes / 2**20))
            table.add_row(
                row.problem if n == 0 else "",
                row.impl,
                _number(row.largest_batch),
                ratio,
                *sizes,
                row.status,
                end_section=n == len(rows) - 1,
            )
    CONSOLE.print(table)


def _number(value: float) -> str:
    """Three digits or all before the point; nothing for NaN."""
    if value != value:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"
