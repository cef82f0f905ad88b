"""Command-line options that the benchmarks share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .implementations import ALIASES, NAMES, best_device, present
from .machine import load_at_start, machine_name, results_folder
from .problem import DTYPE_NAMES
from .tables import CONSOLE


def parser(description: str, *, dtype_option: bool = True) -> argparse.ArgumentParser:
    """--device, --dtype, --threads and --output."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: the best that our kernels run on)")
    if dtype_option:
        p.add_argument("--dtype", choices=DTYPE_NAMES, help="default: float32 on a CPU, float16 on CUDA")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    p.add_argument("--output", type=Path, metavar="FOLDER", help="default: benchmarks/results/<machine>")
    return p


def add_measuring(p: argparse.ArgumentParser, budget: float, impls: str, *, memory_option: bool = True) -> None:
    """--impl, --budget and --no-memory."""
    p.add_argument(
        "--impl",
        nargs="+",
        choices=[*NAMES, *ALIASES, "all"],
        metavar="NAME",
        help=f"default: {impls}; all, or some of {', '.join(NAMES)} (also {_aliases()})",
    )
    p.add_argument(
        "--budget",
        type=float,
        default=budget,
        metavar="SECONDS",
        help=f"about how long the whole run may take; what does not fit is a row that says so (default: {budget:g})",
    )
    if memory_option:
        p.add_argument("--no-memory", action="store_true", help="do not measure memory")


def _aliases() -> str:
    return ", ".join(f"{alias} for {name}" for alias, name in ALIASES.items())


def parse(p: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses, and fills in what depends on the device. `device` has its kind in `kind`."""
    args = p.parse_args(arguments)
    args.device = args.device or best_device()
    args.kind = args.device.split(":")[0]
    if args.kind not in ("cpu", "cuda"):
        p.error(f"--device {args.device}: allowed are cpu, cuda and cuda:N")
    if "dtype" in args:
        args.dtype = DTYPE_NAMES[args.dtype or ("float32" if args.kind == "cpu" else "float16")]
    args.output = args.output or results_folder(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def impls_of(args: argparse.Namespace, default: list[str]) -> list[str]:
    """The implementations asked for, aliases resolved."""
    if args.impl and "all" in args.impl:
        return present(NAMES, args.kind)
    return list(dict.fromkeys(ALIASES.get(name, name) for name in args.impl or default))


def announce(args: argparse.Namespace, what: str) -> None:
    on = f", {torch.get_num_threads()} threads" if args.kind == "cpu" else ""
    load, cores = load_at_start(), os.cpu_count() or 1
    CONSOLE.print(f"{what} on [bold]{machine_name(args.device)}[/] ({args.device}{on}, torch {torch.__version__})")
    if load > cores / 4:
        CONSOLE.print(f"The machine is busy (load {load} on {cores} cores): times will be too long and uneven.")


def say_written(paths: Sequence[Path]) -> None:
    CONSOLE.print("Written:")
    for path in paths:
        CONSOLE.print(f"  {_relative(path)}", soft_wrap=True, highlight=False)


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
