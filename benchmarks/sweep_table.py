"""The columns of attention_sweep_results.csv: the sweep's own names first, then the rest of measure's columns."""

from __future__ import annotations

from pathlib import Path

import pandas

SWEEP_CSV = "attention_sweep_results.csv"
_FIRST = ["tag", "impl", "B", "H", "Tq", "Tkv", "D", "time_ms", "peak_mem_MB", "tflops", "status"]
_RENAMED = {"batch": "B", "heads_q": "H", "seqlen_q": "Tq", "seqlen_k": "Tkv", "head_dim": "D", "ms": "time_ms"}


def to_sweep_columns(frame: pandas.DataFrame) -> pandas.DataFrame:
    """peak_mem_MB counts 2^20 bytes."""
    frame = frame.assign(peak_mem_MB=frame["peak_bytes"] / 2**20).rename(columns=_RENAMED)
    return frame[[*_FIRST, *(column for column in frame if column not in _FIRST)]]


def read_sweep(path: Path) -> pandas.DataFrame:
    """The CSV with measure's names again."""
    return pandas.read_csv(path).rename(columns={new: old for old, new in _RENAMED.items()})
