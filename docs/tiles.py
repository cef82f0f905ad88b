"""Draws docs/tiles.svg, the figure of the README: python docs/tiles.py"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle

ROWS, COLUMNS = 6, 8  # tiles of a score matrix: causal with a left window, Lk > Lq
COLORS = {"skipped": "#f2f2f2", "compared": "#e8a33d", "plain": "#4a7fb5"}


def kind(row: int, column: int) -> str:
    """What the kernel does with a tile: the keys a row sees are one interval, whose ends move with the row."""
    distance = row + COLUMNS - ROWS - column
    if distance < 0 or distance > 4:
        return "skipped"
    return "compared" if distance in (0, 4) else "plain"


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "tiles"  # the same file on every run
    figure, axes = plt.subplots(figsize=(8.4, 4.2))
    for row in range(ROWS):
        for column in range(COLUMNS):
            box = Rectangle((column, ROWS - 1 - row), 0.94, 0.9, color=COLORS[kind(row, column)], linewidth=0)
            axes.add_patch(box)
    for row in range(ROWS):
        axes.text(-0.2, ROWS - 0.55 - row, f"q tile {row}", ha="right", va="center", fontsize=9)
    for column in range(COLUMNS):
        axes.text(column + 0.47, ROWS + 0.1, f"k {column}", ha="center", va="bottom", fontsize=9)
    y = ROWS - 1 - 3 + 0.45  # one task
    axes.annotate("", xy=(6.2, y), xytext=(1.0, y), arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 1.6})
    steps = (
        "one task = one row of tiles, left to right:\n\n"
        "s = q kᵀ              a strip of rows, in L1\n"
        "m′ = max(m, rowmax s)\n"
        "o *= exp(m − m′)      only if m grew\n"
        "p = exp(s − m′)\n"
        "l = l exp(m − m′) + rowsum p\n"
        "o += p v\n\n"
        "at the end: o /= l, lse = m + ln l"
    )
    axes.text(8.4, ROWS - 0.1, steps, va="top", fontsize=9, family="monospace")
    labels = {"skipped": "no key visible: skipped", "compared": "border: compared", "plain": "all visible: no mask"}
    handles = [Patch(color=COLORS[name], label=label) for name, label in labels.items()]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.615, 0.0), frameon=False, fontsize=9)
    axes.set_xlim(-1.6, 14.2)
    axes.set_ylim(-0.2, ROWS + 0.6)
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
