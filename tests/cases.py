"""The case table that tests, fuzz and benchmarks share: every feature is a field of Case, every case makes its own inputs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. Its id names the fields that differ from the defaults; equal cases make equal inputs."""

    dtype: str = "f32"
    head_dim: int = 32
    head_dim_v: int | None = None  # as head_dim
    batch: int = 2
    heads_q: int = 2
    heads_kv: int | None = None  # as heads_q
    seqlen_q: int = 33
    seqlen_k: int = 33
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    bias: str | None = None  # its axes, each b, h, q, k or 1: "bhqk", "1hq1", "qk"
    bias_values: str = "normal"  # or "holes": -inf entries and whole -inf rows
    alibi: str | None = None  # "h" or "bh"
    sinks: bool = False
    extras_dtype: str | None = None  # of bias and sinks: as dtype
    dropout_p: float = 0.0
    lengths_q: tuple[int, ...] | None = None  # per sequence: right-padded, or packed
    lengths_k: tuple[int, ...] | None = None
    packed: bool = False
    layout: str = "bhld"  # memory: see _tensor
    values: str = "normal"  # large, constant, ascending: see _qkv
    seed: int = 0

    @property
    def id(self) -> str:
        words = [self.dtype, f"d{self.head_dim}" + (f"v{self.head_dim_v}" if self.head_dim_v else "")]
        if (self.batch, self.heads_q, self.heads_kv) != (2, 2, None):
            words.append(f"B{self.batch}H{self.heads_q}" + (f"kv{self.heads_kv}" if self.heads_kv else ""))
        words += ["packed"] * self.packed + ["causal"] * self.causal
        words += [f"window{self.window[0]},{self.window[1]}"] * (self.window != (-1, -1))
        words += ["" if self.softmax_scale is None else f"scale{self.softmax_scale:g}"]
        words += [f"softcap{self.softcap:g}"] * (self.softcap > 0) + [f"bias_{self.bias}"] * (self.bias is not None)
        words += [self.bias_values] * (self.bias_values != "normal") + [f"alibi_{self.alibi}"] * (self.alibi is not None)
        words += ["sinks"] * self.sinks + [f"extras_{self.extras_dtype}"] * (self.extras_dtype is not None)
        words += [f"dropout{self.dropout_p:g}"] * (self.dropout_p > 0)
        words += [self.layout] * (self.layout != "bhld") + [self.values] * (self.values != "normal")
        words += [f"Lq{self.seqlen_q}", f"Lk{self.seqlen_k}"] * (not self.packed)
        for axis, lengths in (("q", self.lengths_q), ("k", self.lengths_k)):
            words += ["" if lengths is None else axis + ",".join(map(str, lengths))]
        return "-".join(filter(None, words + [f"seed{self.seed}"] * (self.seed != 0)))

    def inputs(self, device: str = "cpu") -> Inputs:
        return Inputs(self, device)


class Inputs:
    """The tensors of one case. `leaves` are the differentiable ones by name; `args` and `options` are those of the call."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self._random = torch.Generator().manual_seed(case.seed)
        self._device, self._dtype = device, DTYPES[case.dtype]
        extras_dtype = DTYPES[case.extras_dtype or case.dtype]
        exact = torch.promote_types(self._dtype, torch.float32)  # of lse and slopes
        batch = len(case.lengths_q) if case.packed else case.batch
        heads_q, heads_kv = case.heads_q, case.heads_kv or case.heads_q
        sizes = {"b": batch, "h": heads_q, "q": case.seqlen_q, "k": case.seqlen_k, "1": 1}

        leaves = self._qkv(batch, heads_q, heads_kv, case.head_dim_v or case.head_dim)
        if case.bias is not None:
            bias = self._normal(*(sizes[axis] for axis in case.bias))
            if case.bias_values == "holes":
                bias[self._normal(*bias.shape) > 0.5] = -torch.inf
                bias.flatten(0, -2)[::3] = -torch.inf
            leaves["bias"] = bias.to(device, extras_dtype)
        if case.alibi is not None:
            leaves["alibi_slopes"] = self._normal(*(sizes[axis] for axis in case.alibi)).abs().mul(0.2).to(device, exact)
        if case.sinks:
            leaves["sinks"] = self._normal(heads_q).to(device, extras_dtype)
        self.leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}

        self.options: dict[str, Any] = {"causal": case.causal, "window_size": case.window, "softcap": case.softcap}
        self.options |= {"softmax_scale": case.softmax_scale, "dropout_p": case.dropout_p}
        self.options |= {name: leaf for name, leaf in self.leaves.items() if name not in "qkv"}
        if case.dropout_p:
            self.options["seed"] = 0x9E3779B97F4A7C15 + case.seed  # needs all 64 bits
        self.args = tuple(self.leaves[name] for name in "qkv")
        lengths = {"q": case.lengths_q, "k": case.lengths_k}
        if case.packed:
            self.args += tuple(
                torch.tensor([0, *itertools.accumulate(lengths[x])], dtype=torch.int32, device=device) for x in "qk"
            )
            self.max_seqlens = {f"max_seqlen_{x}": max(lengths[x], default=0) for x in "qk"}
        else:
            self.max_seqlens = {}
            self.options |= {
                f"seqlens_{x}": torch.tensor(n, dtype=torch.int32, device=device) for x, n in lengths.items() if n is not None
            }
        q, v = self.args[0], self.args[2]
        self.d_o = self._tensor(*q.shape[:-1], v.shape[-1])
        self.d_lse = self._normal(*((heads_q, q.shape[0]) if case.packed else q.shape[:3])).to(device, exact)
        if not case.packed:
            self._spoil_padding(self.d_o, case.lengths_q)
            self._spoil_padding(self.d_lse, case.lengths_q)

    def in_float64(self) -> Inputs:
        """The same values with float64 leaves, so that gradients are not rounded to the case's dtype."""
        twin = copy.copy(self)
        twin.leaves = {name: x.detach().to(torch.float64).requires_grad_() for name, x in self.leaves.items()}
        twin.args = tuple(twin.leaves[name] for name in "qkv") + self.args[3:]
        twin.options = self.options | {name: leaf for name, leaf in twin.leaves.items() if name not in "qkv"}
        return twin

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, dtype=torch.float64)

    def _tensor(self, *shape: int, values: Tensor | None = None) -> Tensor:
        """Values (normal unless given) in the case's layout, the last axis contiguous in each."""
        x = (self._normal(*shape) if values is None else values).to(self._device, self._dtype)
        match self.case.layout:
            case "blhd":  # the transposed view of (B, L, H, D); of (H, T, D) for packed sequences
                return x.transpose(-3, -2).contiguous().transpose(-3, -2)
            case "gaps":  # rows cut out of longer ones, at an address that no vector is aligned to
                wide = x.new_full((*shape[:-1], shape[-1] + 3), torch.nan)
                wide[..., 1:-2] = x
                return wide[..., 1:-2]
            case "expanded":  # one head's memory serves all heads
                axis = -2 if self.case.packed else -3
                return x.narrow(axis, 0, min(1, x.shape[axis])).expand(shape)
        return x

    def _qkv(self, batch: int, heads_q: int, heads_kv: int, head_dim_v: int) -> dict[str, Tensor]:
        case = self.case
        shapes = {"q": (heads_q, case.head_dim), "k": (heads_kv, case.head_dim), "v": (heads_kv, head_dim_v)}
        lengths = {"q": (case.seqlen_q, case.lengths_q), "k": (case.seqlen_k, case.lengths_k)}
        lengths["v"] = lengths["k"]
        tensors = {}
        for name, (heads, dim) in shapes.items():
            padded, each = lengths[name]
            shape = (sum(each), heads, dim) if case.packed else (batch, heads, padded, dim)
            x = self._normal(*shape)
            axis = 0 if case.packed else 2
            if case.values == "large" and name != "v":  # logits to +-1e4
                x *= (1e4 / 4) ** 0.5
            if case.values == "constant" and name != "v":  # every key of a head scores the same
                x = x.narrow(axis, 0, min(1, x.shape[axis])).expand(shape)
            if case.values == "ascending" and name != "v":  # every key beats the ones before: the running maximum moves
                ramp = torch.linspace(0.1, 40, x.shape[axis], dtype=torch.float64).view(-1, *[1] * (x.dim() - axis - 1))
                x = x * 0.05 + (1 if name == "q" else ramp * case.head_dim**-0.5)
            tensors[name] = self._tensor(*shape, values=x)
            if not case.packed:
                self._spoil_padding(tensors[name], each)
        return tensors

    def _spoil_padding(self, x: Tensor, lengths: tuple[int, ...] | None) -> None:
        """Rows beyond a sequence's length may hold anything: here NaN, unless the memory is shared."""
        for b, length in enumerate(lengths or ()):
            if self.case.layout != "expanded":
                x[b, :, length:] = torch.nan


def _cases() -> Iterator[Case]:
    """The table: each line names what it is after."""
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
    for n, (dim, dim_v) in enumerate(((64, 128), (128, 64), (192, 128), (5, 33), (33, 1), (512, 8), (8, 512), (576 - 64, 512))):
        yield case(("f32", "bf16", "f16", "f64")[n % 4], dim, dim_v, batch=1, seqlen_q=19, seqlen_k=70, causal=n % 2 == 1)
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
        yield case(**feature, sinks=True, extras_dtype="f64" if dtype == "f64" else "f32", bias="qk", bias_values="holes")
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
    for n, axes in enumerate(("bhqk", "bhq1", "b1qk", "1hqk", "11qk", "b11k", "bh11", "1111", "hqk", "qk", "q1", "k", "")):
        grouped = {"batch": 3, "heads_q": 4, "heads_kv": 2, "seqlen_q": 35, "seqlen_k": 70}
        yield case(("f32", "bf16")[n % 2], **grouped, bias=axes, causal=n % 3 == 0)
    for dtype in ("f32", "f16"):
        yield case(dtype, bias="bhqk", bias_values="holes", seqlen_q=40, seqlen_k=80)
        yield case(dtype, bias="1hqk", bias_values="holes", seqlen_q=40, seqlen_k=80, causal=True, sinks=True)
    # Dropout: high rates, groups cut at every edge, long rows.
    for p, seqlen_q, seqlen_k in ((0.5, 7, 9), (0.9, 33, 47), (0.1, 130, 300), (0.999, 20, 20), (1e-4, 17, 257)):
        yield case(dropout_p=p, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=(200, 5))
        yield case("bf16", 64, dropout_p=p, seqlen_q=seqlen_q, seqlen_k=seqlen_k, packed=True,
                   lengths_q=(seqlen_q, 5), lengths_k=(seqlen_k, 11))  # fmt: skip
    # Memory.
    for layout, dtype in itertools.product(("blhd", "gaps", "expanded"), ("f32", "bf16")):
        yield case(dtype, 40, layout=layout, heads_q=4, heads_kv=2, seqlen_q=50, seqlen_k=71, causal=True)
        yield case(dtype, 64, layout=layout, packed=True, lengths_q=(50, 3), lengths_k=(40, 31), alibi="h")
    # Values.
    for values, dtype in itertools.product(("large", "constant", "ascending"), DTYPES):
        yield case(dtype, 64, values=values, seqlen_q=70, seqlen_k=300, causal=True)
        yield case(dtype, 64, values=values, seqlen_q=70, seqlen_k=300, softcap=30.0, sinks=True)
    for scale in (0.0, -1.0, 3.0):
        yield case(softmax_scale=scale, seqlen_k=70)
    # Padded and packed: empty sequences, single rows, longer and shorter than a tile.
    for dtype in ("f32", "f16"):
        yield case(dtype, batch=4, lengths_k=(0, 1, 33, 70), seqlen_k=70, causal=True)
        yield case(dtype, batch=4, lengths_q=(0, 1, 70, 64), seqlen_q=70, alibi="bh", dropout_p=0.2)
        yield case(dtype, batch=3, lengths_q=(0, 70, 3), lengths_k=(70, 0, 9), seqlen_q=70, seqlen_k=70, bias="b1qk")
        yield case(dtype, packed=True, lengths_q=(0, 70, 3, 257, 1), lengths_k=(70, 0, 9, 130, 1), causal=True, sinks=True)
        yield case(dtype, packed=True, lengths_q=(1,) * 5, lengths_k=(5, 64, 1, 300, 33), heads_q=8, heads_kv=2)
    # Nothing to do.
    for zero in ({"seqlen_q": 0}, {"seqlen_k": 0}, {"batch": 0}, {"seqlen_q": 0, "seqlen_k": 0}):
        yield case(**zero, causal=True)
    yield case(seqlen_k=0, sinks=True)
    yield case(packed=True, lengths_q=(), lengths_k=())
    yield case(packed=True, lengths_q=(0, 0), lengths_k=(0, 4))


CASES = tuple(_cases())
assert len({case.id for case in CASES}) == len(CASES), "two cases with one id"
