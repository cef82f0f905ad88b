"""The demonstration: our kernels beside PyTorch's own, over a sweep of lengths, on this machine, in about a minute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas
import torch

from tests.cases import Case

from . import plots
from .arguments import add_measuring, announce, impls_of, parse, parser, say_written
from .implementations import best_device
from .measure import measure_all, write_csv
from .problem import Problem
from .tables import CONSOLE, print_results

CSV = "demo.csv"
_IMPLS = ["naive", "fused", "torch_flash", "torch_unfused"]


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser(
        "Measures causal attention over a sweep of lengths: naive and fused beside PyTorch's SDPA (torch_flash) and\n"
        "its unfused attention; forward, and forward with backward at two lengths. Writes a table and pictures."
    )
    add_measuring(p, 60, " ".join(_IMPLS))
    p.add_argument("--lengths", type=int, nargs="+", metavar="L", help="default: 256 … 4096 (… 8192 on CUDA)")
    args = parse(p, arguments)
    if torch.cuda.is_available() and best_device() == "cpu":
        CONSOLE.print("This build has no CUDA kernel for this machine's GPU: measuring on the CPU.")
    announce(args, "FlashAttention demo")

    lengths = args.lengths or [256, 512, 1024, 2048, 4096, *([8192] * (args.kind == "cuda"))]
    batch, heads = (1, 8) if args.kind == "cpu" else (4, 16)
    cases = [Case(args.dtype, 64, batch=batch, heads_q=heads, seqlen_q=n, seqlen_k=n, causal=True) for n in lengths]
    trained = [case for case in cases if case.seqlen_q in (512, 1024)] or cases[:1]
    problems = [Problem(case, "fwd", args.device) for case in cases]
    problems += [Problem(case, "fwd+bwd", args.device) for case in trained]
    frame = measure_all(problems, impls_of(args, _IMPLS), budget=args.budget, with_memory=not args.no_memory)
    print_results(frame, "Attention on this machine")
    say_written([write_csv(frame, args.output / CSV), *plot(frame, args.output)])


def plot(frame: pandas.DataFrame, folder: Path) -> list[Path]:
    forward = frame[frame["pass"] == "fwd"]
    title = plots.what(forward, "Attention, forward")
    panels = {"time": plots.time, "speed": plots.speed, "memory": plots.memory}
    fig, row = plots.figure(1, 3, title=title, panel=(4.4, 3.6))
    for axes, draw in zip(row, panels.values(), strict=True):
        draw(axes, forward, "seqlen_q", "length")
    written = [plots.save(fig, folder / "demo.png")]
    for name, draw in panels.items():
        fig, (axes,) = plots.figure(1, 1, title=title, panel=(6.6, 4.2))
        draw(axes, forward, "seqlen_q", "length")
        written.append(plots.save(fig, folder / f"demo_{name}.png"))
    return written


if __name__ == "__main__":
    main()
