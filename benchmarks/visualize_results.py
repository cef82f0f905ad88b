"""Every picture from every CSV in a results folder, and overview.png with the most telling of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas

from . import benchmark_memory, benchmark_speed, decode, demo, features, from_scratch, grid, plot_attention_sweep, plots
from .arguments import parse, parser, say_written
from .sweep_table import SWEEP_CSV, read_sweep
from .tables import CONSOLE

_PICTURES: dict[str, Callable[[pandas.DataFrame, Path], list[Path]]] = {
    SWEEP_CSV: plot_attention_sweep.plot,
    demo.CSV: demo.plot,
    benchmark_speed.CSV: benchmark_speed.plot,
    from_scratch.CSV: from_scratch.plot,
    benchmark_memory.CSV: benchmark_memory.plot,
    benchmark_memory.BATCH_CSV: benchmark_memory.plot_batches,
    features.CSV: features.plot,
    decode.CSV: decode.plot,
    grid.CSV: lambda frame, folder: [plots.plot_ratios(grid.ratios_to_best_peer(frame), folder / "grid.png")],
}


_READERS = {SWEEP_CSV: read_sweep, grid.CSV: grid.read_grid}


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser(__doc__)
    p.add_argument("folder", type=Path, nargs="?", help="results folder (default: this machine's)")
    args = parse(p, arguments)
    folder = args.folder or args.output
    frames = read_results(folder)
    if not frames:
        p.error(f"{folder} holds none of {', '.join(_PICTURES)}: the other benchmarks write them")
    written = [path for name, frame in frames.items() for path in _PICTURES[name](frame, folder)]
    if overview := plot_overview(frames, folder):
        written.append(overview)
    else:
        CONSOLE.print(f"No overview without {' or '.join(_SOURCES)}.")
    say_written(written)


def read_results(folder: Path) -> dict[str, pandas.DataFrame]:
    """The CSVs of the folder that have pictures, by name."""
    found = {name: folder / name for name in _PICTURES if (folder / name).exists()}
    return {name: _READERS.get(name, pandas.read_csv)(path) for name, path in found.items()}


_SOURCES = (benchmark_speed.CSV, demo.CSV)  # of the forward by length: the first that is there


def plot_overview(frames: dict[str, pandas.DataFrame], folder: Path) -> Path | None:
    """Forward time and speed, backward speed, and memory, against length."""
    source = next((frames[name] for name in _SOURCES if name in frames), None)
    if source is None:
        return None
    memory = frames.get(benchmark_memory.CSV, source)
    forward, backward = (source[source["pass"].isin(names)] for names in (["fwd"], ["bwd", "fwd+bwd"]))
    fig, panels = plots.figure(2, 2, title=plots.what(source, "Attention"))
    plots.time(panels[0], forward, "seqlen_q", "length")
    panels[0].set_title("forward: time")
    plots.speed(panels[1], forward, "seqlen_q", "length")
    panels[1].set_title("forward: speed")
    plots.speed(panels[2], backward, "seqlen_q", "length")
    panels[2].set_title("backward: speed" if "bwd" in set(backward["pass"]) else "forward and backward: speed")
    plots.memory(panels[3], memory[memory["pass"] == "fwd"], "seqlen_q", "length")
    panels[3].set_title("forward: memory")
    return plots.save(fig, folder / "overview.png")


if __name__ == "__main__":
    main()
