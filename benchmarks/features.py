"""What each feature of attention costs, ours beside the peers: dropout, softcap, ALiBi, bias, windows, sinks, packing,
head_dims.

bfloat16, B 4, H 16, L 4096, D 128 on CUDA, float32, B 1, H 4, L 512 on a CPU; causal but for the bias. A cost is the
speed (TFLOP/s of what the mask leaves) of the same kernel and pass on plain attention, causal or full as the feature
is, over that with the feature. The most telling features come first, and what has to be compiled is measured after
all else, so that a short budget leaves out the rest. features.csv has the columns feature, pass, impl, ms, tflops,
then the others of grid.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import pandas
from rich.table import Table

from tests.cases import Case

from . import plots
from .arguments import add_measuring, announce, impls_of, parse, parser, say_written
from .grid import geometric_mean, ratios_to_best_peer
from .implementations import OURS, find, present
from .measure import COLUMNS, measure_all, write_csv
from .problem import Problem
from .tables import CONSOLE, throughput

CSV = "features.csv"
PLAIN = ("plain causal", "plain full")
_FIRST = ["feature", "pass", "impl", "ms", "tflops"]
_PASSES = ("fwd", "bwd")
_IMPLS = {
    "cpu": ["fused", "torch_flash", "torch_unfused", "flex"],
    "cuda": ["fused", "tensor_core", "hopper", "torch_flash", "torch_cudnn", "torch_efficient", "flex"],
}
_PLAIN_CASES = {
    "cpu": Case("f32", 128, batch=1, heads_q=4, seqlen_q=512, seqlen_k=512, causal=True),
    "cuda": Case("bf16", 128, batch=4, heads_q=16, seqlen_q=4096, seqlen_k=4096, causal=True),
}
_BUDGET = {"cpu": 60.0, "cuda": 80.0}
_SHARE_BEFORE_COMPILING = 0.6  # of the budget
_DOCUMENTS = 24


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser(__doc__, dtype_option=False)
    add_measuring(p, 0, "our fast kernels and the peers of the device")
    p.set_defaults(budget=None)
    p.add_argument("--passes", nargs="+", choices=_PASSES, default=_PASSES)
    p.add_argument("--features", nargs="+", metavar="NAME", help="those whose name begins so: plain, bias, D192, …")
    args = parse(p, arguments)
    problems = _problems(args)
    if not problems:
        p.error(f"--features: the names are {', '.join(cases(_PLAIN_CASES[args.kind]))}")
    announce(args, "Features")

    impls = impls_of(args, present(_IMPLS[args.kind], args.kind))
    frame = measure(problems, impls, args.budget or _BUDGET[args.kind], with_memory=not args.no_memory)
    for _, of_pass in frame.groupby("pass", sort=False):
        print_costs(of_pass)
    say_written([write_csv(frame, args.output / CSV), *plot(frame, args.output)])


def cases(plain: Case) -> dict[str, Case]:
    """The features by name, the most telling first."""
    length, shortest = plain.seqlen_k, plain.seqlen_k // 64
    steps = [n * 7 % _DOCUMENTS for n in range(_DOCUMENTS)]  # long and short ones mixed
    documents = tuple(shortest + (length // 2 - shortest) * step // (_DOCUMENTS - 1) for step in steps)
    changes = {
        "plain causal": {},
        "dropout 0.125": {"dropout_p": 0.125},
        "softcap 30": {"softcap": 30.0},
        "alibi": {"alibi": "h"},
        "plain full": {"causal": False},
        "bias": {"causal": False, "bias": "bhqk"},
        "bias + its gradient": {"causal": False, "bias": "bhqk"},
        **{f"window {keys}": {"window": (keys, -1)} for keys in (length // 16, length // 4)},
        "sinks": {"sinks": True},
        "varlen": {"packed": True, "lengths_q": documents, "lengths_k": documents},
        **{f"D{dim}": {"head_dim": dim} for dim in (32, 80, 96, 192)},
        "D192/128": {"head_dim": 192, "head_dim_v": 128},
        "D256": {"head_dim": 256},
    }
    return {name: dataclasses.replace(plain, **change) for name, change in changes.items()}


def _problems(args: argparse.Namespace) -> list[tuple[str, Problem]]:
    """(feature, problem) of those asked for."""
    return [
        (name, Problem(case, direction, args.device, ("bias",) if name == "bias + its gradient" else ()))
        for name, case in cases(_PLAIN_CASES[args.kind]).items()
        if not args.features or name.startswith(tuple(args.features))
        for direction in args.passes
    ]


def measure(
    problems: Sequence[tuple[str, Problem]], impls: Sequence[str], budget: float, *, with_memory: bool
) -> pandas.DataFrame:
    """measure_all's rows, `feature` before them; what has to be compiled is measured after all else."""
    deadline = time.monotonic() + budget
    compiled = [impl for impl in impls if find(impl).compiles]
    others = [impl for impl in impls if impl not in compiled]
    frames = []
    for names, share in ((others, _SHARE_BEFORE_COMPILING if compiled else 1), (compiled, 1)):
        if names:
            left = share * max(0.0, deadline - time.monotonic())
            rows = measure_all([problem for _, problem in problems], names, budget=left, with_memory=with_memory)
            numbers = [n for n in range(len(problems)) for _ in names]
            frames.append(rows.assign(feature=[problems[n][0] for n in numbers], number=numbers))
    frame = pandas.concat(frames).sort_values("number", kind="stable", ignore_index=True)
    return frame[_FIRST + [column for column in COLUMNS if column not in _FIRST]]


def costs(frame: pandas.DataFrame) -> pandas.Series:
    """Speed of the same kernel and pass on plain attention with the same mask / each row's."""
    same = ["causal", "pass", "impl"]
    plain = frame["tflops"].where(frame["feature"].isin(PLAIN))
    return plain.groupby([frame[name] for name in same]).transform("max") / frame["tflops"]


def print_costs(frame: pandas.DataFrame) -> None:
    """One pass: a row for each feature, a column for each implementation, our ratio to the best peer."""
    speeds, unit = throughput(frame)
    direction, dtype = frame[["pass", "dtype"]].iloc[0]
    table = Table(
        title=f"{plots.PASS_TITLES[direction].capitalize()}, {unit}: {dtype} {_sizes(frame)}",
        title_justify="left",
        caption="in brackets the cost: speed of plain attention, causal or full as the feature is / speed; "
        "ratio: time of the best peer / our time",
        caption_justify="left",
    )
    table.add_column("feature", no_wrap=True)
    for impl in frame["impl"].unique():
        table.add_column(impl, justify="right")
    table.add_column("best peer")
    table.add_column("ratio", justify="right")
    ratios = ratios_to_best_peer(frame, ["feature", "pass"]).set_index("feature")
    for feature, rows in frame.assign(speed=speeds, cost=costs(frame)).groupby("feature", sort=False):
        peer, ratio = ("", "")
        if feature in ratios.index:
            peer, of_best = ratios.loc[feature, ["peer", "ratio"]]
            ratio = f"[{'green' if of_best >= 1 else 'yellow'}]{of_best:.2f}[/]"
        table.add_row(feature, *(_cell(row) for row in rows.itertuples()), peer, ratio)
    CONSOLE.print(table)
    if len(ratios):
        mean, smallest = geometric_mean(ratios["ratio"]), ratios["ratio"].min()
        CONSOLE.print(f"ratio: geometric mean {mean:.2f}, smallest {smallest:.2f}, {len(ratios)} features")


def _cell(row: tuple) -> str:
    """The speed and its cost, or the first words of why there is none."""
    if row.ms != row.ms:
        reason = row.status.split(":")[0]
        return "–" if reason == "unavailable" else f"[yellow]{reason}[/]"
    text = f"{row.speed:.3g}" + (f" ({row.cost:.2f}x)" if row.cost == row.cost else "")
    if row.status != "ok":
        return f"[yellow]{text} {row.status.split(':')[0]}[/]"
    return f"[bold]{text}[/]" if row.impl in OURS else text


def plot(frame: pandas.DataFrame, folder: Path) -> list[Path]:
    passes = list(frame.groupby("pass", sort=False))
    title = f"What features cost: {_sizes(frame)}\n{plots.where(frame)}"
    fig, panels = plots.figure(len(passes), 1, title=title, panel=(12.5, 3.3))
    for axes, (direction, rows) in zip(panels, passes, strict=True):
        speeds, unit = throughput(rows)
        plots.bars(axes, rows.assign(speed=speeds), "feature", "speed", ylabel=unit)
        axes.set_title(plots.PASS_TITLES[direction])
    return [plots.save(fig, folder / "features.png")]


def _sizes(frame: pandas.DataFrame) -> str:
    first = frame.iloc[0]
    return f"B{first.batch} H{first.heads_q} L{first.seqlen_k} D{first.head_dim}"


if __name__ == "__main__":
    main()
