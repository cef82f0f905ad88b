"""Times attention: one case, or a sweep over lengths, decoding and head_dim."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.cases import Case

from . import plot_attention_sweep
from .arguments import add_measuring, announce, impls_of, parse, parser, say_written
from .implementations import defaults
from .measure import measure_all, write_csv
from .problem import Problem
from .sweep_table import SWEEP_CSV, to_sweep_columns
from .tables import print_results

_DESCRIPTION = """\
Times attention. Without --sweep: one case, checked against float64, then timed.
With --sweep: prefill (Tq = Tkv from 32 to 4096), decode (Tq = 1, Tkv from 128 to 4096) and head_dim (Tq = Tkv =
1024), every implementation turn by turn, into attention_sweep_results.csv and pictures. peak_mem_MB counts 2^20 bytes.

  python -m benchmarks.attention --B 1 --H 32 --Tq 2048 --Tkv 2048 --D 64 --dtype float16 --device cuda \\
      --causal --impl fused
  python -m benchmarks.attention --sweep --budget 120"""


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser(_DESCRIPTION)
    add_measuring(p, 120, "fused; in a sweep every implementation of the device")
    p.add_argument("--B", type=int, default=1, help="batch (default: 1)")
    p.add_argument("--H", type=int, help="query heads (default: 8 on a CPU, 32 on CUDA)")
    p.add_argument("--Hkv", type=int, help="key and value heads (default: as H)")
    p.add_argument("--Tq", type=int, default=1024, help="queries (default: 1024)")
    p.add_argument("--Tkv", type=int, help="keys (default: as Tq)")
    p.add_argument("--D", type=int, default=64, help="head_dim (default: 64)")
    p.add_argument("--causal", action="store_true", help="causal mask, aligned at the bottom right")
    p.add_argument("--backward", action="store_true", help="time the backward instead of the forward")
    p.add_argument("--sweep", action="store_true", help="sweep instead of one case")
    p.add_argument("--max-length", type=int, default=4096, help="longest length of the sweep (default: 4096)")
    args = parse(p, arguments)
    args.H = args.H or (8 if args.kind == "cpu" else 32)
    announce(args, "Attention sweep" if args.sweep else "Attention")
    if args.sweep:
        say_written(sweep(args))
    else:
        problem = _problem(args, args.Tq, args.Tq if args.Tkv is None else args.Tkv, args.D)
        frame = measure_all([problem], impls_of(args, ["fused"]), budget=args.budget, with_memory=not args.no_memory)
        print_results(frame, "One case")


def sweep(args: argparse.Namespace) -> list[Path]:
    """Runs the sweep, prints it, and returns the files written."""
    tagged = list(_sweep_problems(args))
    impls = impls_of(args, defaults(args.kind))
    frame = measure_all([problem for _, problem in tagged], impls, budget=args.budget, with_memory=not args.no_memory)
    frame.insert(0, "tag", [tag for tag, _ in tagged for _ in impls])
    print_results(frame, "Sweep")
    csv = write_csv(to_sweep_columns(frame), args.output / SWEEP_CSV)
    return [csv, *plot_attention_sweep.plot(frame, args.output)]


def _problem(args: argparse.Namespace, seqlen_q: int, seqlen_k: int, head_dim: int) -> Problem:
    case = Case(
        args.dtype,
        head_dim,
        batch=args.B,
        heads_q=args.H,
        heads_kv=args.Hkv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        causal=args.causal,
    )
    forward = "decode" if seqlen_q == 1 else "fwd"
    return Problem(case, "bwd" if args.backward else forward, args.device)


def _sweep_problems(args: argparse.Namespace) -> Iterator[tuple[str, Problem]]:
    lengths = [n for n in (32, 64, 128, 256, 512, 1024, 2048, 4096) if n <= args.max_length]
    for length in lengths:
        yield "prefill", _problem(args, length, length, args.D)
    for length in lengths:
        if length >= 128 and not args.backward:
            yield "decode", _problem(args, 1, length, args.D)
    for head_dim in (32, 64, 96, 128, 192, 256):
        length = min(1024, args.max_length)
        yield "head_dim", _problem(args, length, length, head_dim)


if __name__ == "__main__":
    main()
