"""Measurements of attention: one command a question, each with --help.

    python -m benchmarks.demo                  our kernels beside PyTorch's on this machine, in about a minute
    python -m benchmarks.from_scratch          our kernels beside PyTorch's unfused attention, length by length
    python -m benchmarks.attention             one case, or a sweep over lengths, decoding and head_dim (--sweep)
    python -m benchmarks.benchmark_speed       forward and backward time for each length
    python -m benchmarks.benchmark_memory      memory for each length, and the largest batch in a given memory
    python -m benchmarks.host                  what a call costs on the host, beside PyTorch's
    python -m benchmarks.grid                  the grid that kernels are compared on, with the ratio to the best peer
    python -m benchmarks.decode                new tokens over a cache of keys and values: layouts, pages, float8, …
    python -m benchmarks.features              what each feature costs: dropout, softcap, bias, windows, head_dims, …
    python -m benchmarks.plot_attention_sweep  pictures of a sweep
    python -m benchmarks.visualize_results     pictures of everything in a results folder, and one overview

A result is checked against float64 before it is timed (checking), implementations are timed turn by turn (timing),
memory is measured beside (memory), and every row of every CSV says what, where, when and how well (measure).
"""
