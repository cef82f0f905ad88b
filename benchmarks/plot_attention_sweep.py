"""Pictures of a sweep: time, log time, memory and speed against length; decoding; head_dim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas
from matplotlib.axes import Axes

from . import plots
from .arguments import parse, parser, say_written
from .sweep_table import SWEEP_CSV, read_sweep


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser("Draws a sweep of python -m benchmarks.attention --sweep from its CSV.")
    p.add_argument("csv", type=Path, nargs="?", help=f"default: {SWEEP_CSV} in the output folder")
    args = parse(p, arguments)
    csv = args.csv or args.output / SWEEP_CSV
    if not csv.exists():
        p.error(f"{csv} does not exist: python -m benchmarks.attention --sweep writes it")
    say_written(plot(read_sweep(csv), args.output))


def plot(frame: pandas.DataFrame, folder: Path) -> list[Path]:
    """Draws a sweep (measure's columns and `tag`); returns the files. A sweep of the backward has no decoding."""
    by_tag = {tag: rows for tag, rows in frame.groupby("tag", sort=False)}
    written = [_plot_prefill(by_tag["prefill"], folder, name) for name in _PREFILL_PANELS]
    if "decode" in by_tag:
        written.append(_plot_decode(by_tag["decode"], folder))
    return [*written, _plot_head_dim(by_tag["head_dim"], folder)]


Panel = Callable[[Axes, pandas.DataFrame], None]
_LENGTH = "length (queries = keys)"
_PREFILL_PANELS: dict[str, Panel] = {
    "time": lambda axes, frame: plots.time(axes, frame, "seqlen_q", _LENGTH, log_y=False),
    "time_log": lambda axes, frame: plots.time(axes, frame, "seqlen_q", _LENGTH),
    "memory": lambda axes, frame: plots.memory(axes, frame, "seqlen_q", _LENGTH),
    "tflops": lambda axes, frame: plots.speed(axes, frame, "seqlen_q", _LENGTH),
}


def _plot_prefill(prefill: pandas.DataFrame, folder: Path, name: str) -> Path:
    fig, (axes,) = plots.figure(
        1, 1, title=plots.what(prefill, f"Prefill, {plots.PASS_TITLES[prefill['pass'].iloc[0]]}"), panel=(6.6, 4.2)
    )
    _PREFILL_PANELS[name](axes, prefill)
    return plots.save(fig, folder / f"sweep_{name}.png")


def _plot_decode(decode: pandas.DataFrame, folder: Path) -> Path:
    fig, (left, right) = plots.figure(1, 2, title=plots.what(decode, "Decoding, one query"))
    plots.time(left, decode, "seqlen_k", "keys")
    plots.bandwidth(right, decode, "seqlen_k", "keys")
    return plots.save(fig, folder / "sweep_decode.png")


def _plot_head_dim(head_dim: pandas.DataFrame, folder: Path) -> Path:
    fig, (left, right) = plots.figure(
        1, 2, title=plots.what(head_dim, f"Head dimensions at length {head_dim.seqlen_q.iloc[0]}")
    )
    plots.time(left, head_dim, "head_dim", "head_dim")
    plots.speed(right, head_dim, "head_dim", "head_dim")
    return plots.save(fig, folder / "sweep_head_dim.png")


if __name__ == "__main__":
    main()
