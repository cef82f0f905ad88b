"""Random cases, every feature together with every other, forward and all gradients; each follows from two integers.

    python -m tests.fuzz --cases 1000 --seconds 600 --seed 1 --device cpu --impl auto
    python -m tests.fuzz --kvcache

Ends with a failure count; each failure prints the one command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # small calls: spinning threads would starve each other
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic, and warns

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from flash_attention import _C  # noqa: E402

from .cache_fuzz import check_cache_case, random_cache_case  # noqa: E402
from .cases import Case  # noqa: E402
from .checks import assert_correct, run, serves  # noqa: E402

_TILES = (8, 16, 32, 64, 128, 256)
_WORK = {"cpu": 4e6, "cuda": 4e8}  # most score entries x (D + Dv) of a case


def _length(rng: random.Random) -> int:
    """Mostly small, often at a tile's edge, rarely zero or past the largest tile."""
    kind = rng.random()
    if kind < 0.03:
        return 0
    if kind < 0.40:
        return max(1, rng.choice(_TILES) + rng.choice((-1, 0, 1)))
    return round(2 ** rng.uniform(0, 8.6 if kind > 0.9 else 6.5))


def _head_dim(rng: random.Random) -> int:
    return rng.choice((8, 16, 24, 32, 40, 64, 64, 72, 80, 96, 128, 128, 136, 192, 256, 512, rng.randint(1, 100)))


def random_case(seed: int, number: int, device: str = "cpu") -> Case:
    """Case `number` of the stream `seed`; the same case on every machine of a device."""
    rng = random.Random(f"{seed}/{number}")

    def perhaps(probability: float, value: object, otherwise: object) -> object:
        return value if rng.random() < probability else otherwise

    heads_kv, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 4, 5))
    dtype, head_dim, batch = (
        rng.choice(("f32", "f32", "bf16", "bf16", "f16", "f64")),
        _head_dim(rng),
        rng.choice((1, 2, 3)),
    )
    head_dim_v = perhaps(0.3, _head_dim(rng), None)
    packed = rng.random() < 0.3
    seqlens = (_length(rng), _length(rng))
    work = batch * heads_kv * group * (head_dim + (head_dim_v or head_dim))
    while work * seqlens[0] * seqlens[1] > _WORK[device]:
        seqlens = tuple(n // 2 + 1 if n == max(seqlens) else n for n in seqlens)
    lengths = [tuple(rng.choice((0, min(1, n), n, rng.randint(0, n))) for _ in range(batch)) for n in seqlens]
    if not packed:
        lengths = [perhaps(0.25, each, None) for each in lengths]
    values = perhaps(0.15, rng.choice(("large", "constant", "ascending")), "normal")
    softcap = perhaps(0.25, rng.choice((0.5, 5.0, 30.0)), 0.0)
    if dtype == "f64" and softcap and values == "large":
        values = "normal"  # where tanh is flat the float64 oracle has lost the digits that float64 is held to
    bias = perhaps(0.0 if packed else 0.35, "".join(perhaps(0.6, axis, "1") for axis in "bhqk"), None)
    return Case(
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        batch=batch,
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        seqlen_q=seqlens[0],
        seqlen_k=seqlens[1],
        causal=rng.random() < 0.5,
        window=tuple(perhaps(0.25, rng.choice((0, 1, rng.randint(0, 100))), -1) for _ in range(2)),
        softmax_scale=perhaps(0.15, rng.choice((0.0, -0.1, 0.3)), None),
        softcap=softcap,
        bias=bias,
        bias_values=perhaps(0.2, "holes", "normal") if bias else "normal",
        alibi=perhaps(0.3, rng.choice(("h", "bh")), None),
        sinks=rng.random() < 0.3,
        extras_dtype=perhaps(0.5, "f32", None) if dtype != "f32" else None,
        dropout_p=perhaps(0.3, rng.choice((0.1, 0.5, 0.9, round(rng.random(), 4))), 0.0),
        lengths_q=lengths[0],
        lengths_k=lengths[1],
        packed=packed,
        layout=perhaps(0.5, rng.choice(("blhd", "lbhd", "gaps", "expanded", "mixed", "mixed")), "bhld"),
        values=values,
        seed=number,
    )


def failure(seed: int, number: int, device: str, impl: str) -> str | None:
    """None, or what went wrong and the command that repeats it. A kernel may refuse what it does not promise."""
    case = random_case(seed, number, device)
    try:
        assert_correct(run(case.inputs(device), impl), case, device)
    except Exception as error:
        if not serves(impl, case) and "cannot serve this request" in str(error):
            return None
        command = f"python -m tests.fuzz --seed {seed} --first {number} --cases 1 --device {device} --impl {impl}"
        return f"{command}\n{case!r}\n{type(error).__name__}: {error}"
    return None


def cache_failure(seed: int, number: int, device: str, impl: str) -> str | None:
    """As failure(), of attention over a key/value cache."""
    case = random_cache_case(seed, number, device)
    try:
        check_cache_case(case, device, impl)
    except Exception as error:
        command = f"python -m tests.fuzz --kvcache --seed {seed} --first {number} --cases 1"
        return f"{command} --device {device} --impl {impl}\n{case!r}\n{type(error).__name__}: {error}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=None, help="how many; without --seconds 500")
    parser.add_argument("--seconds", type=float, default=None, help="stop after this long")
    parser.add_argument("--seed", type=int, default=0, help="which stream of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--device", default="cpu", choices=sorted(_WORK))
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--kvcache", action="store_true", help="attention over a key/value cache")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is seen, or this torch is built without CUDA")
    impls = ["auto", *(impl for impl, device in _C.kernels() if device == options.device)]
    if options.impl not in impls:  # else it would refuse every case, and refusing is no failure
        parser.error(f"--impl {options.impl}: this build has {', '.join(impls)} on {options.device}")
    cases = options.cases or (500 if options.seconds is None else 10**9)
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    attempt = cache_failure if options.kvcache else failure
    start, done, failures = time.monotonic(), 0, 0
    with tqdm(total=options.cases or cases if options.seconds is None else options.cases, unit="case") as progress:
        while done < cases and (options.seconds is None or time.monotonic() - start < options.seconds):
            complaint = attempt(options.seed, options.first + done, options.device, options.impl)
            if complaint:
                failures += 1
                progress.write(f"\n{complaint}\n")
            done += 1
            progress.set_postfix(failures=failures)
            progress.update()
    print(f"{done} cases, {failures} failures")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
