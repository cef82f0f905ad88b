"""One look for every picture: an implementation has one colour and one marker everywhere, ours are drawn thick."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .implementations import OURS
from .tables import shape_texts, throughput

matplotlib.use("Agg")  # files, also where there is no display

# Okabe and Ito's palette, told apart by colour-blind readers too; markers and line styles repeat what colour says.
_STYLES = {
    "naive": ("#D55E00", "s", "-"),
    "split": ("#E69F00", "D", "-"),
    "fused": ("#0072B2", "o", "-"),
    "tensor_core": ("#009E73", "^", "-"),
    "hopper": ("#000000", "v", "-"),
    "reference": ("#8C510A", "p", "-"),
    "auto": ("#0072B2", "*", "-"),
    "torch_flash": ("#CC79A7", "X", "--"),
    "torch_flash_float32": ("#CC79A7", "1", "-."),
    "torch_cudnn": ("#56B4E9", "P", "--"),
    "torch_efficient": ("#A6761D", "<", "--"),
    "flex": ("#6A3D9A", "8", "--"),
    "torch_math": ("#999999", ">", ":"),
    "torch_unfused": ("#555555", "h", ":"),
    "megatron": ("#B8A600", "d", ":"),
}
_HATCHES = {"-.": "///"}  # of bars whose colour is another's, by the style of their line
_KIND_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LEGEND_INCHES, _LETTER_INCHES = 0.55, 0.08  # of an entry of the legend: its marker and space, a letter
_GROUP_WIDTH = 0.8  # of the distance between groups of bars
_FAR_APART = 20  # times: on a linear axis the smaller could not be read
PASS_TITLES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward", "decode": "decoding"}
_STYLE = {
    "figure.dpi": 120,
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "font.size": 9.5,
}


def figure(
    rows: int, columns: int, *, title: str, panel: tuple[float, float] = (5.2, 3.6)
) -> tuple[Figure, list[Axes]]:
    """A grid of panels, one legend for all of them below (drawn by save)."""
    matplotlib.rcParams.update(_STYLE)
    fig = Figure(figsize=(panel[0] * columns, panel[1] * rows + 0.9), layout="constrained")
    fig.suptitle(title, fontsize=11)
    return fig, list(fig.subplots(rows, columns, squeeze=False).flat)


def lines(
    axes: Axes, frame: pandas.DataFrame, x: str, y: str, *, log_y: bool = False, ylabel: str, xlabel: str
) -> None:
    """One line for each implementation, over the values of x; for times also the band from smallest to largest."""
    drawn = frame.dropna(subset=[y])
    for impl, rows in drawn.groupby("impl", sort=False):
        rows = rows.sort_values(x)
        colour, marker, style = _STYLES[impl]
        axes.plot(
            rows[x],
            rows[y],
            label=impl,
            color=colour,
            marker=marker,
            linestyle=style,
            linewidth=2.2 if impl in OURS else 1.4,
            markersize=5,
        )
        if y == "ms":
            axes.fill_between(rows[x], rows["ms_min"], rows["ms_max"], color=colour, alpha=0.1, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _log2_ticks(axes, sorted(drawn[x].unique()))
    if log_y:
        _log10_axis(axes, drawn[y])
    else:
        axes.set_ylim(bottom=0)
    if drawn.empty:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="grey")


def _log10_axis(axes: Axes, values: pandas.Series) -> None:
    """Ticks at 1, 2 and 5 where there are few decades."""
    few = not values.empty and values.max() < 100 * values.min()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _log2_ticks(axes: Axes, values: Sequence[int]) -> None:
    """A tick at every measured value."""
    if len(values) == 0:
        return
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [short(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def short(value: int) -> str:
    """4096 as 4k."""
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)


def time(axes: Axes, frame: pandas.DataFrame, x: str, xlabel: str, *, log_y: bool = True) -> None:
    lines(axes, frame, x, "ms", log_y=log_y, ylabel="time, ms", xlabel=xlabel)


def memory(axes: Axes, frame: pandas.DataFrame, x: str, xlabel: str) -> None:
    in_mib = frame.assign(mib=frame["peak_bytes"] / 2**20)
    lines(
        axes,
        in_mib[in_mib["mib"] > 0],
        x,
        "mib",
        log_y=True,
        ylabel="peak memory beyond the inputs, MiB",
        xlabel=xlabel,
    )


def speed(axes: Axes, frame: pandas.DataFrame, x: str, xlabel: str) -> None:
    values, unit = throughput(frame)
    best = values.groupby(frame["impl"]).max()
    far_apart = best.max() > _FAR_APART * best.min()
    lines(axes, frame.assign(speed=values), x, "speed", log_y=far_apart, ylabel=unit, xlabel=xlabel)


def bars(axes: Axes, frame: pandas.DataFrame, groups: str, y: str, *, ylabel: str, series: str = "impl") -> None:
    """A group of bars for each value of a column, in it a bar for each implementation, or in greys for each value of
    `series`."""
    places = {group: place for place, group in enumerate(frame[groups].unique())}
    by_group = frame.groupby(groups)
    count = by_group[y].transform("size")
    width = _GROUP_WIDTH / count.max()
    x = frame[groups].map(places) + (by_group.cumcount() + 0.5 - count / 2) * width
    names = frame[series].unique()
    for n, name in enumerate(names):
        is_name = frame[series] == name
        axes.bar(
            x[is_name],
            frame.loc[is_name, y],
            width,
            label=name,
            color=_STYLES[name][0] if series == "impl" else str(0.2 + 0.6 * n / len(names)),
            hatch=_HATCHES.get(_STYLES[name][2]) if series == "impl" else None,
            alpha=0.75 if series == "impl" and name not in OURS else 1,
        )
    axes.set_xticks(range(len(places)), places, rotation=25, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(ylabel)


def bandwidth(axes: Axes, frame: pandas.DataFrame, x: str, xlabel: str) -> None:
    lines(axes, frame, x, "gbs", ylabel="K and V read, GB/s", xlabel=xlabel)


def save(fig: Figure, path: Path) -> Path:
    """With one legend under the panels, so that it covers no data."""
    handles = {
        label: handle for axes in fig.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        inches = _LEGEND_INCHES + _LETTER_INCHES * max(map(len, handles))
        ncols = min(7, len(handles), max(1, int(fig.get_figwidth() / inches)))
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    return path


def where(frame: pandas.DataFrame) -> str:
    """Machine, threads, dtype, day and commit, for a title."""
    first = frame.iloc[0]
    threads = [f"{first['threads']} threads"] if first["machine"].endswith("core") else []
    dtype = [first["dtype"]] if frame["dtype"].nunique() == 1 else []
    return ", ".join([first["machine"], *threads, *dtype, first["date"][:10], f"commit {first['commit']}"])


def what(frame: pandas.DataFrame, name: str) -> str:
    """The name, the sizes that all rows share, and where they were measured: a title of two lines."""
    shared, _ = shape_texts(frame.drop(columns=["dtype", "pass"]).assign(dtype="", **{"pass": ""}))
    return f"{name}: {shared}\n{where(frame)}"


def plot_ratios(ratios: pandas.DataFrame, path: Path) -> Path:
    """A marker for each problem of the grid: peer time / our time, a panel for each pass."""
    passes = list(ratios.groupby("pass", sort=False))
    fig, panels = figure(
        1, len(passes), title=f"Grid: time of the best peer / our time\n{where(ratios)}", panel=(4.6, 4.0)
    )
    kinds = list(dict.fromkeys(zip(ratios["dtype"], ratios["head_dim"], strict=True)))
    colours = dict(zip(kinds, _KIND_COLOURS * len(kinds), strict=False))
    for axes, (direction, rows) in zip(panels, passes, strict=True):
        for (dtype, head_dim, causal), kind in rows.groupby(["dtype", "head_dim", "causal"], sort=False):
            colour = colours[dtype, head_dim]
            axes.plot(
                kind["seqlen_k"],
                kind["ratio"],
                label=f"{dtype} D{head_dim} {'causal' if causal else 'full'}",
                color=colour,
                markerfacecolor=colour if causal else "none",
                marker="o" if causal else "s",
                linestyle="none",
            )
        axes.axhline(1, color="black", linewidth=1)
        axes.set(title=PASS_TITLES[direction], xlabel="length (keys)", ylabel="ratio (above 1: ours is faster)")
        if max(1, rows["ratio"].max()) > _FAR_APART * rows["ratio"].min():
            _log10_axis(axes, rows["ratio"])
        else:
            axes.set_ylim(bottom=0)
        _log2_ticks(axes, sorted(rows["seqlen_k"].unique()))
    return save(fig, path)
