"""The grid that kernels are compared on: our fastest kernels beside every peer, and their ratio to the best peer.

On CUDA: B L = 16384 and Hq D = 2048, bfloat16 and float32 forward and backward, float16 forwards, grouped heads, long
context, decoding. On a CPU: float32 first, 16 bits beside it, forward, backward and decoding; --full adds the
remaining dtypes, head counts and lengths. Options choose among the problems.
grid.csv has the columns pass … causal of the problem (causal is blank in decoding, where it makes no difference), then
the result's.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas
import torch
from rich.table import Table

from tests.cases import Case

from .arguments import add_measuring, announce, impls_of, parse, parser, say_written
from .implementations import OURS, present
from .measure import SHAPE, measure_all, write_csv
from .plots import plot_ratios
from .problem import DTYPE_NAMES, Problem
from .tables import CONSOLE, print_results, shape_texts

CSV = "grid.csv"
_IMPLS = {
    "cpu": ["fused", "torch_flash", "torch_flash_float32", "torch_math", "torch_unfused"],
    "cuda": ["fused", "tensor_core", "hopper", "torch_flash", "torch_cudnn", "torch_efficient"],
}
_BUDGET = {"cpu": 480.0, "cuda": 420.0}
_FULL_BUDGET = 7200.0


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser(__doc__, dtype_option=False)
    add_measuring(p, 0, "our fast kernels and every peer of the device")
    p.set_defaults(budget=None)
    p.add_argument("--full", action="store_true", help="the whole grid (a CPU needs an hour or two)")
    only = p.add_argument_group("which problems (default: all)")
    only.add_argument("--passes", nargs="+", choices=["fwd", "bwd", "decode"])
    only.add_argument("--dtype", nargs="+", choices=DTYPE_NAMES, dest="dtypes")
    only.add_argument("--lengths", nargs="+", type=int, metavar="L", help="of the keys")
    only.add_argument("--head-dims", nargs="+", type=int, metavar="D")
    only.add_argument("--mask", choices=["full", "causal"])
    args = parse(p, arguments)
    announce(args, "Grid")

    cells = dict.fromkeys(_cuda_cells() if args.kind == "cuda" else _cpu_cells(args.full))  # without repetitions
    problems = [Problem(case, direction, args.device) for direction, case in cells if _is_chosen(args, direction, case)]
    if not problems:
        p.error("the grid has no such problem")
    budget = args.budget or (_FULL_BUDGET if args.full else _BUDGET[args.kind])
    impls = impls_of(args, present(_IMPLS[args.kind], args.kind))
    frame = measure_all(problems, impls, budget=budget, with_memory=not args.no_memory)
    print_results(frame, "Grid", base="torch_flash")
    ratios = ratios_to_best_peer(frame)
    print_ratios(ratios)
    written = [write_csv(_without_mask_of_decoding(frame), args.output / CSV)]
    say_written(written if ratios.empty else [*written, plot_ratios(ratios, args.output / "grid.png")])


def read_grid(path: Path) -> pandas.DataFrame:
    """The CSV with a mask in every row."""
    frame = pandas.read_csv(path)
    return frame.assign(causal=frame["causal"].eq(True))


def _without_mask_of_decoding(frame: pandas.DataFrame) -> pandas.DataFrame:
    return frame.assign(causal=frame["causal"].astype(object).where(frame["pass"] != "decode"))


def _is_chosen(args: argparse.Namespace, direction: str, case: Case) -> bool:
    dtypes = args.dtypes and [DTYPE_NAMES[name] for name in args.dtypes]
    asked = (args.passes, dtypes, args.lengths, args.head_dims, args.mask and [args.mask])
    of_case = (direction, case.dtype, case.seqlen_k, case.head_dim, "causal" if case.causal else "full")
    return all(not values or value in values for values, value in zip(asked, of_case, strict=True))


def _cpu_cells(full: bool) -> Iterator[tuple[str, Case]]:
    """(pass, case). Batch, Hq, Hkv: one sequence, grouped heads, a small batch."""
    lengths = (128, 512, 1024, 2048, 4096)
    for length, head_dim, causal in itertools.product(lengths, (64, 128), (False, True)):
        yield "fwd", _case("f32", 1, 8, 8, length, head_dim, causal)
        if full or length <= 2048:
            yield "bwd", _case("f32", 1, 8, 8, length, head_dim, causal)
    for direction in ("fwd", "bwd"):
        yield direction, _case("f32", 1, 32, 8, 1024, 128, True)
        yield direction, _case("f32", 4, 16, 16, 512, 64, True)
    for dtype, head_dim, length in itertools.product(("bf16", "f16"), (64, 128), (512, 2048)):
        yield "fwd", _case(dtype, 1, 8, 8, length, head_dim, True)
    yield "bwd", _case("bf16", 1, 8, 8, 1024, 128, True)
    for dtype, (batch, seqlen_k) in itertools.product(("f32", "bf16"), ((1, 512), (1, 4096), (1, 32768), (8, 4096))):
        yield "decode", _case(dtype, batch, 32, 8, seqlen_k, 128, False, seqlen_q=1)
    if full:
        heads = ((1, 8, 8), (1, 32, 8), (4, 16, 16))
        dtypes = ("f32", "bf16", "f16")
        for dtype, sizes, length, dim, causal in itertools.product(dtypes, heads, lengths, (64, 128), (False, True)):
            yield "fwd", _case(dtype, *sizes, length, dim, causal)
            yield "bwd", _case(dtype, *sizes, length, dim, causal)
        for dtype, batch, seqlen_k in itertools.product(dtypes, (1, 8), (512, 1024, 2048, 4096, 8192, 16384, 32768)):
            yield "decode", _case(dtype, batch, 32, 8, seqlen_k, 128, False, seqlen_q=1)


def _cuda_cells() -> Iterator[tuple[str, Case]]:
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    for direction in ("bwd", "fwd"):
        for head_dim, causal, length in itertools.product((64, 128, 256), (False, True), lengths):
            heads = 2048 // head_dim
            yield direction, _case("bf16", 16384 // length, heads, heads, length, head_dim, causal)
        yield direction, _case("bf16", 4, 32, 8, 4096, 128, True)
        yield direction, _case("bf16", 1, 16, 16, 65536, 128, True)
        for head_dim, causal, length in itertools.product((64, 128), (False, True), (2048, 4096)):
            heads = 2048 // head_dim
            yield direction, _case("f32", 16384 // length, heads, heads, length, head_dim, causal)
    for length in lengths:
        yield "fwd", _case("f16", 16384 // length, 16, 16, length, 128, False)
    for batch, seqlen_k in ((128, 4096), (64, 8192), (16, 8192), (1, 8192), (1, 65536), (1, 262144), (1, 1024)):
        yield "decode", _case("bf16", batch, 32, 8, seqlen_k, 128, False, seqlen_q=1)


def _case(
    dtype: str,
    batch: int,
    heads_q: int,
    heads_kv: int,
    length: int,
    head_dim: int,
    causal: bool,
    seqlen_q: int | None = None,
) -> Case:
    return Case(
        dtype,
        head_dim,
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q or length,
        seqlen_k=length,
        causal=causal,
    )


def ratios_to_best_peer(frame: pandas.DataFrame, problem: Sequence[str] = SHAPE) -> pandas.DataFrame:
    """For each problem that both sides were timed on: our fastest kernel, the fastest peer, peer time / our time.

    A kernel of ours that is less accurate than is allowed does not count; a peer does. `problem` are the columns that
    tell one problem from another.
    """
    problem = list(problem)
    timed = frame.dropna(subset=["ms"])
    is_ours = timed["impl"].isin(OURS)

    def fastest(rows: pandas.DataFrame, name: str) -> pandas.DataFrame:
        best = rows.loc[rows.groupby(problem)["ms"].idxmin()] if len(rows) else rows
        return best[[*problem, "impl", "ms"]].rename(columns={"impl": name, "ms": f"{name}_ms"})

    both = frame[[*problem, "machine", "threads", "commit", "date"]].drop_duplicates(problem)
    for rows, name in ((timed[is_ours & (timed["status"] == "ok")], "ours"), (timed[~is_ours], "peer")):
        both = both.merge(fastest(rows, name), on=problem)
    return both.assign(ratio=both["peer_ms"] / both["ours_ms"])


def print_ratios(ratios: pandas.DataFrame) -> None:
    if ratios.empty:
        CONSOLE.print("No problem has both our time and a peer's.")
        return
    shared, problems = shape_texts(ratios)
    table = Table(title=f"Time of the best peer / our time: {shared}", title_justify="left")
    for column in ("problem", "ours", "ms", "best peer", "ms", "ratio"):
        table.add_column(
            column, justify="left" if column in ("problem", "ours", "best peer") else "right", no_wrap=True
        )
    for problem, row in zip(problems, ratios.itertuples(), strict=True):
        style = "green" if row.ratio >= 1 else "yellow"
        table.add_row(
            problem, row.ours, f"{row.ours_ms:.3g}", row.peer, f"{row.peer_ms:.3g}", f"[{style}]{row.ratio:.2f}[/]"
        )
    CONSOLE.print(table)
    for direction, of_pass in ratios.groupby("pass", sort=False)["ratio"]:
        CONSOLE.print(
            f"{direction}: geometric mean {geometric_mean(of_pass):.2f}, smallest {of_pass.min():.2f}, "
            f"{len(of_pass)} problems"
        )
    CONSOLE.print(f"all: geometric mean [bold]{geometric_mean(ratios['ratio']):.2f}[/]")


def geometric_mean(values: pandas.Series) -> float:
    return torch.tensor(values.to_numpy()).log().mean().exp().item()


if __name__ == "__main__":
    main()
