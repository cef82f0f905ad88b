"""Time and speed of forward and backward for each length, ours beside PyTorch's flash and unfused attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas

from tests.cases import Case

from . import plots
from .arguments import add_measuring, announce, impls_of, parse, parser, say_written
from .measure import measure_all, write_csv
from .problem import Problem
from .tables import print_results

CSV = "speed.csv"
_PASSES = ("fwd", "bwd")


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser("Measures forward and backward for each length and draws time and speed against length.")
    add_measuring(p, 150, "naive fused torch_flash torch_unfused")
    p.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[128, 256, 512, 1024, 2048, 4096],
        metavar="L",
        help="default: 128 … 4096",
    )
    p.add_argument("--batch", type=int, help="default: 1 on a CPU, 4 on CUDA")
    p.add_argument("--heads", type=int, default=8, help="default: 8")
    p.add_argument("--head-dim", type=int, default=64, help="default: 64")
    p.add_argument("--full", action="store_true", help="without the causal mask")
    args = parse(p, arguments)
    announce(args, "Speed")

    batch = args.batch or (1 if args.kind == "cpu" else 4)
    cases = [
        Case(args.dtype, args.head_dim, batch=batch, heads_q=args.heads, seqlen_q=n, seqlen_k=n, causal=not args.full)
        for n in args.lengths
    ]
    problems = [Problem(case, direction, args.device) for case in cases for direction in _PASSES]
    impls = impls_of(args, ["naive", "fused", "torch_flash", "torch_unfused"])
    frame = measure_all(problems, impls, budget=args.budget, with_memory=not args.no_memory)
    print_results(frame, "Speed")
    say_written([write_csv(frame, args.output / CSV), *plot(frame, args.output)])


def plot(frame: pandas.DataFrame, folder: Path) -> list[Path]:
    fig, panels = plots.figure(2, 2, title=plots.what(frame, "Attention"))
    for n, direction in enumerate(_PASSES):
        rows = frame[frame["pass"] == direction]
        plots.time(panels[n], rows, "seqlen_q", "length")
        plots.speed(panels[2 + n], rows, "seqlen_q", "length")
        panels[n].set_title(plots.PASS_TITLES[direction])
    return [plots.save(fig, folder / "speed.png")]


if __name__ == "__main__":
    main()
