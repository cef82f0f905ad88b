"""Random cases of attention over a key/value cache: `python -m tests.fuzz --kvcache`."""

from __future__ import annotations

import random

from .cache_cases import CacheCase
from .cache_checks import assert_caches_correct, assert_correct, run, same_bits, serves

_WORK = {"cpu": 4e6, "cuda": 4e8}  # most score entries x (D + Dv) of a case
_TILES = (8, 16, 32, 64, 128, 256)


def random_cache_case(seed: int, number: int, device: str = "cpu") -> CacheCase:
    """Case `number` of the stream `seed`; the same case on every machine of a device."""
    rng = random.Random(f"cache/{seed}/{number}")

    def perhaps(probability: float, value: object, otherwise: object) -> object:
        return value if rng.random() < probability else otherwise

    def edge() -> int:
        return rng.choice(_TILES) * rng.choice((1, 1, 2, 3)) + rng.choice((-1, 0, 1))

    dtype = rng.choice(("f32", "bf16", "bf16", "f16", "f64"))
    heads_kv, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 4, 7, 8, 16, 20))
    head_dim = rng.choice((8, 16, 40, 64, 64, 96, 128, 128, 192, 256, 512, rng.randint(1, 100)))
    head_dim_v = perhaps(0.2, rng.choice((16, 64, 128, rng.randint(1, 100))), None)
    seqlen_q = rng.choice((1, 1, 1, 2, 3, 4, 5, 8, 16, 17, 33, 64, rng.randint(1, 150)))
    append = rng.random() < 0.6
    lengths = [
        rng.choice((0, 1, rng.randint(0, 40), edge(), edge(), rng.randint(0, 1000))) for _ in range(rng.randint(1, 5))
    ]
    work = heads_kv * group * seqlen_q * (head_dim + (head_dim_v or head_dim))
    while work * sum(length + seqlen_q for length in lengths) > _WORK[device] and (max(lengths) > 1 or seqlen_q > 1):
        seqlen_q, work = (seqlen_q + 1) // 2, work * ((seqlen_q + 1) // 2) // seqlen_q
        lengths = [length // 2 for length in lengths]
    float8 = dtype in ("f16", "bf16") and rng.random() < 0.25
    page_size = perhaps(0.5, rng.choice((1, 2, 3, 16, 16, 32, 64, 128, 256, rng.randint(1, 70))), None)
    rotary = perhaps(0.4, rng.choice(("interleaved", "halves")), None) if append and head_dim > 1 else None
    return CacheCase(
        dtype=dtype,
        float8=float8,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        lengths=tuple(lengths),
        append=append,
        page_size=page_size,
        slack=rng.choice((0, 1, 5, 100)),
        batch_idx=page_size is None and rng.random() < 0.4,
        layout=rng.choice(("bhld", "bhld", "blhd", "gaps")),
        rotary=rotary,
        rotary_dim=perhaps(0.5, 2 * rng.randint(1, head_dim // 2), head_dim // 2 * 2) if rotary else None,
        rotary_dtype=perhaps(0.5, "f32", None) if dtype != "f64" else None,
        causal=rng.random() < 0.7,
        window=tuple(perhaps(0.25, rng.choice((0, 1, rng.randint(0, 300))), -1) for _ in range(2)),
        softcap=perhaps(0.2, rng.choice((0.5, 5.0, 30.0)), 0.0),
        softmax_scale=perhaps(0.15, rng.choice((0.0, -0.1, 0.3)), None),
        alibi=perhaps(0.2, rng.choice(("h", "bh")), None),
        sinks=rng.random() < 0.2,
        tree=perhaps(0.3, rng.choice(("one", "each")), None),
        descale=perhaps(0.7, rng.choice(("h", "bh")), None) if float8 else None,
        seed=number,
    )


def check_cache_case(case: CacheCase, device: str, impl: str) -> None:
    """Raises AssertionError; passes what the kernel does not take."""
    arguments = case.inputs(device)
    if not serves(impl, arguments):
        return
    got = run(arguments, impl)
    assert_correct(got, case, device)
    assert_caches_correct(case, arguments, device)
    again = run(case.inputs(device), impl, num_splits=1 + case.seed % 9)
    assert all(same_bits(got[name], again[name]) for name in got), f"{case.id}: num_splits changes bits"
