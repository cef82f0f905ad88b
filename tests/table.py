"""The case table: what every kernel must get right, forward and all gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .cases import DTYPES, Case


def _cases() -> Iterator[Case]:
    case = Case
    # Lengths: 1, tile - 1, tile, tile + 1, primes; both ways.
    tiles = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 113, 255, 256, 257)
    for n, length in enumerate(tiles):
        yield case(seqlen_q=length, seqlen_k=length, causal=n % 2 == 0)
        yield case("bf16", 64, seqlen_q=length, seqlen_k=tiles[-1 - n], causal=n % 2 == 1)
    for seqlen_q, seqlen_k in ((113, 203), (203, 113), (1, 257), (257, 1), (5, 64), (64, 5), (2, 521), (300, 17)):
        for dtype in ("f32", "bf16"):
            yield case(dtype, 128 if dtype == "bf16" else 24, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=True)
    yield case("f64", seqlen_q=67, seqlen_k=131)
    yield case("f32", 64, batch=1, seqlen_q=600, seqlen_k=777, causal=True)
    # Head dims: powers of two, odd multiples of 8, odd numbers, both ends; Dv either side of D.
    head_dims = (1, 2, 5, 8, 16, 24, 33, 40, 56, 64, 72, 80, 96, 104, 128, 136, 160, 192, 200, 256, 264, 320, 511, 512)
    for n, head_dim in enumerate(head_dims):
        for dtype in ("f32", ("bf16", "f16", "f64")[n % 3]):
            yield case(dtype, head_dim, batch=1, seqlen_q=37, seqlen_k=53, causal=n % 2 == 0)
    for n, (dim, dim_v) in enumerate(
        ((64, 128), (128, 64), (192, 128), (5, 33), (33, 1), (512, 8), (8, 512), (576 - 64, 512))
    ):
        yield case(
            ("f32", "bf16", "f16", "f64")[n % 4], dim, dim_v, batch=1, seqlen_q=19, seqlen_k=70, causal=n % 2 == 1
        )
    for dtype in DTYPES:
        yield case(dtype, 512, batch=1, heads_q=1, seqlen_q=150, seqlen_k=203, causal=True)
    # Rows too wide to lie in a tile whole, with every feature; Dv either side of D.
    wide = {"heads_q": 4, "heads_kv": 2, "seqlen_q": 67, "seqlen_k": 131, "lengths_q": (67, 20), "lengths_k": (40, 131)}
    wide |= {"dropout_p": 0.2, "alibi": "h", "sinks": True}
    for n, (dim, dim_v) in enumerate(
        ((136, 136), (160, 72), (72, 160), (256, 192), (264, 512), (512, 264), (511, 129), (129, 511))
    ):
        dtype = ("f32", "bf16", "f16", "f64")[n % 4]
        yield case(dtype, dim, dim_v, **wide, bias="1hqk", softcap=2.0 * (n % 2))
        yield case("f32", dim, dim_v, **wide, packed=True, causal=True, window=(90, 3))
    # 16 bits, whose tiles on tensor cores are 32 ... 256 wide, 128 rows high and 64 keys long; lengths around them.
    lengths = ((1, 193), (63, 64), (64, 63), (65, 129), (127, 128), (128, 65), (129, 127), (193, 1))
    dims = ((8, 24), (24, 8), (40, 72), (72, 40), (96, 104), (104, 96), (136, 160), (160, 136), (192, 200), (200, 192))
    for n, (dim, dim_v) in enumerate((*dims, (256, 64), (64, 256), (256, 256))):
        call = {"dtype": ("bf16", "f16")[n % 2], "head_dim": dim, "head_dim_v": dim_v, "heads_q": 4, "heads_kv": 2}
        seqlen_q, seqlen_k = lengths[n % 8]
        yield case(**call, batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=n % 4 < 2)
        seqlen_q, seqlen_k = lengths[(n + 3) % 8]
        each = {"lengths_q": (seqlen_q, seqlen_q // 2, 0), "lengths_k": (seqlen_k, 0, seqlen_k)}
        window = ((65, 3), (-1, 64), (128, -1), (0, 0))[n % 4]
        yield case(**call, **each, packed=True, window=window, sinks=n % 3 == 0, causal=n % 4 > 1)
        seqlen_q, seqlen_k = lengths[(n + 6) % 8]
        each = {"lengths_q": (seqlen_q, seqlen_q // 2), "lengths_k": (seqlen_k // 2, seqlen_k)}
        modified = {"bias": "bhqk", "alibi": "bh", "sinks": True, "dropout_p": 0.1, "softcap": 3.0 * (n % 2)}
        yield case(**call, **each, **modified, seqlen_q=seqlen_q, seqlen_k=seqlen_k, layout=("bhld", "blhd")[n % 2])
    # Each feature alone and a few together, in every dtype.
    for dtype in DTYPES:
        feature = {"dtype": dtype, "head_dim": 64, "seqlen_q": 65, "seqlen_k": 97}
        yield case(**feature)
        yield case(**feature, causal=True, heads_q=6, heads_kv=2)
        yield case(**feature, heads_q=5, heads_kv=1, window=(17, 3))
        yield case(**feature, window=(-1, 5), softcap=2.0)
        yield case(**feature, window=(0, 0), sinks=True)
        yield case(**feature, bias="bhqk", causal=True)
        yield case(**feature, bias="1h1k", softcap=1.5, alibi="h")
        yield case(**feature, alibi="bh", causal=True, heads_q=4, heads_kv=2)
        yield case(
            **feature, sinks=True, extras_dtype="f64" if dtype == "f64" else "f32", bias="qk", bias_values="holes"
        )
        yield case(**feature, dropout_p=0.25, causal=True, heads_q=4, heads_kv=2)
        yield case(**feature, lengths_q=(65, 20), lengths_k=(31, 97), causal=True, sinks=True)
        yield case(**feature, packed=True, lengths_q=(20, 65, 1, 33), lengths_k=(97, 31, 5, 33), causal=True)
        everything = {"window": (40, 9), "softcap": 3.0, "alibi": "bh", "sinks": True, "dropout_p": 0.1, "heads_q": 4}
        yield case(**feature, **everything, heads_kv=2, bias="bhqk", lengths_q=(60, 65), lengths_k=(97, 44))
        yield case(**feature, **everything, heads_kv=2, packed=True, lengths_q=(60, 65), lengths_k=(97, 44))
    # Masks: windows that skip whole tiles and rows that see nothing.
    for window in ((0, 0), (0, -1), (-1, 0), (64, 0), (100, 31), (3, 1000), (1 << 40, 1 << 40), (0, 300)):
        yield case(batch=1, seqlen_q=290, seqlen_k=550, window=window)
        yield case("bf16", 64, batch=1, seqlen_q=270, seqlen_k=70, window=window, causal=True)
    # Bias: every kind of broadcast.
    for n, axes in enumerate(
        ("bhqk", "bhq1", "b1qk", "1hqk", "11qk", "b11k", "bh11", "1111", "hqk", "qk", "q1", "k", "")
    ):
        grouped = {"batch": 3, "heads_q": 4, "heads_kv": 2, "seqlen_q": 35, "seqlen_k": 70}
        yield case(("f32", "bf16")[n % 2], **grouped, bias=axes, causal=n % 3 == 0)
    # The same where d_bias is the sum over many heads and tiles, whose edges are cut.
    many = {"head_dim": 8, "batch": 4, "heads_q": 24, "heads_kv": 8, "seqlen_q": 65, "seqlen_k": 129}
    for n, axes in enumerate(("bhqk", "bhq1", "b1qk", "1hqk", "11qk", "b11k", "bh11", "q1", "k", "")):
        yield case(**many, bias=axes, causal=n % 3 == 0)
    for dtype in ("f32", "f16"):
        yield case(dtype, bias="bhqk", bias_values="holes", seqlen_q=40, seqlen_k=80)
        yield case(dtype, bias="1hqk", bias_values="holes", seqlen_q=40, seqlen_k=80, causal=True, sinks=True)
    # Dropout: high rates, groups cut at every edge, long rows.
    for p, seqlen_q, seqlen_k in ((0.5, 7, 9), (0.9, 33, 47), (0.1, 130, 300), (0.999, 20, 20), (1e-4, 17, 257)):
        yield case(dropout_p=p, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=(200, 5))
        yield case("bf16", 64, dropout_p=p, seqlen_q=seqlen_q, seqlen_k=seqlen_k, packed=True,
                   lengths_q=(seqlen_q, 5), lengths_k=(seqlen_k, 11))  # fmt: skip
    # Memory.
    for layout, dtype in itertools.product(("blhd", "lbhd", "gaps", "expanded", "mixed"), ("f32", "bf16")):
        yield case(dtype, 40, layout=layout, heads_q=4, heads_kv=2, seqlen_q=50, seqlen_k=71, bias="1hqk")
        yield case(dtype, 64, layout=layout, packed=True, lengths_q=(50, 3), lengths_k=(40, 31), alibi="h")
    # Values.
    for values, dtype in itertools.product(("large", "constant", "ascending"), DTYPES):
        yield case(dtype, 64, values=values, seqlen_q=70, seqlen_k=300, causal=True)
        yield case(dtype, 64, values=values, seqlen_q=70, seqlen_k=300, softcap=30.0, sinks=True)
    for dtype in DTYPES:  # every score of a head far from zero, and as far
        far = {"values": "constant", "softmax_scale": 20.0, "bias": "bhqk", "alibi": "bh", "sinks": True}
        yield case(dtype, 64, **far, heads_q=4, heads_kv=2, seqlen_q=70, seqlen_k=130, dropout_p=0.1, causal=True)
    for scale in (0.0, -1.0, 3.0):
        yield case(softmax_scale=scale, seqlen_k=70)
        yield case("bf16", 64, softmax_scale=scale, seqlen_q=130, seqlen_k=70, causal=True)
    # Padded and packed: empty sequences, single rows, longer and shorter than a tile.
    for dtype in ("f32", "f16"):
        yield case(dtype, batch=4, lengths_k=(0, 1, 33, 70), seqlen_k=70, causal=True)
        yield case(dtype, batch=4, lengths_q=(0, 1, 70, 64), seqlen_q=70, alibi="bh", dropout_p=0.2)
        yield case(dtype, batch=3, lengths_q=(0, 70, 3), lengths_k=(70, 0, 9), seqlen_q=70, seqlen_k=70, bias="b1qk")
        yield case(
            dtype, packed=True, lengths_q=(0, 70, 3, 257, 1), lengths_k=(70, 0, 9, 130, 1), causal=True, sinks=True
        )
        yield case(dtype, packed=True, lengths_q=(1,) * 5, lengths_k=(5, 64, 1, 300, 33), heads_q=8, heads_kv=2)
    # Nothing to do.
    for zero in ({"seqlen_q": 0}, {"seqlen_k": 0}, {"batch": 0}, {"seqlen_q": 0, "seqlen_k": 0}):
        yield case(**zero, causal=True)
    yield case(seqlen_k=0, sinks=True)
    yield case(packed=True, lengths_q=(), lengths_k=())
    yield case(packed=True, lengths_q=(0, 0), lengths_k=(0, 4))


CASES = tuple(_cases())
assert len({case.id for case in CASES}) == len(CASES), "two cases with one id"
