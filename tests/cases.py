"""A call as data, for tests, fuzz and benchmarks: every feature is a field of Case, and a case makes its own inputs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
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
    layout: str = "bhld"  # memory, see _tensor; "mixed": each tensor its own
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
        words += [self.bias_values] * (self.bias_values != "normal") + [f"alibi_{self.alibi}"] * (
            self.alibi is not None
        )
        words += ["sinks"] * self.sinks + [f"extras_{self.extras_dtype}"] * (self.extras_dtype is not None)
        words += [f"dropout{self.dropout_p:g}"] * (self.dropout_p > 0)
        words += [self.layout] * (self.layout != "bhld") + [self.values] * (self.values != "normal")
        words += [f"Lq{self.seqlen_q}", f"Lk{self.seqlen_k}"] * (not self.packed)
        for axis, lengths in (("q", self.lengths_q), ("k", self.lengths_k)):
            words += ["" if lengths is None else axis + ",".join(map(str, lengths))]
        return "-".join(filter(None, words + [f"seed{self.seed}"] * (self.seed != 0)))

    def inputs(self, device: str = "cpu", *, drawn_there: bool = False) -> Inputs:
        """Drawn on the host in float64, so that every device and dtype has the same values; long ones are drawn where
        and in the dtype in which they are used."""
        return Inputs(self, device, drawn_there)


class Inputs:
    """The tensors of one case: `leaves` are the differentiable ones by name, `args` and `options` those of the call."""

    def __init__(self, case: Case, device: str, drawn_there: bool) -> None:
        self.case = case
        self._device, self._dtype = device, DTYPES[case.dtype]
        self._random = torch.Generator(device if drawn_there else "cpu").manual_seed(case.seed)
        self._drawn_dtype = self._dtype if drawn_there else torch.float64
        self._layouts = itertools.cycle(("gaps", "blhd", "bhld", "lbhd"))
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
            bias = bias.to(device, extras_dtype)
            if case.layout != "bhld" and bias.dim() >= 2:  # keys apart in memory, queries side by side
                bias = bias.mT.contiguous().mT
            leaves["bias"] = bias
        if case.alibi is not None:
            leaves["alibi_slopes"] = (
                self._normal(*(sizes[axis] for axis in case.alibi)).abs().mul(0.2).to(device, exact)
            )
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
                f"seqlens_{x}": torch.tensor(n, dtype=torch.int32, device=device)
                for x, n in lengths.items()
                if n is not None
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
        return torch.randn(shape, generator=self._random, dtype=self._drawn_dtype, device=self._random.device)

    def _tensor(self, *shape: int, values: Tensor | None = None) -> Tensor:
        """Values (normal unless given) in the case's layout, the last axis contiguous in each."""
        x = (self._normal(*shape) if values is None else values).to(self._device, self._dtype)
        layout = next(self._layouts) if self.case.layout == "mixed" else self.case.layout
        match layout:
            case "blhd":  # the transposed view of (B, L, H, D); of (H, T, D) for packed sequences
                return x.transpose(-3, -2).contiguous().transpose(-3, -2)
            case "lbhd" if not self.case.packed:  # batch between length and heads
                return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
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
                x = x.narrow(axis, 0, min(1, x.shape[axis])).expand(shape).contiguous()
            if case.values == "ascending" and name != "v":  # every key beats the ones before: the running maximum moves
                ramp = torch.linspace(0.1, 40, x.shape[axis], dtype=x.dtype, device=x.device) * case.head_dim**0.5
                x *= 0.05
                x[..., -1] = 1 if name == "q" else ramp.view(-1, *[1] * (x.dim() - axis - 2))
            tensors[name] = self._tensor(*shape, values=x)
            if not case.packed:
                self._spoil_padding(tensors[name], each)
        return tensors

    def _spoil_padding(self, x: Tensor, lengths: tuple[int, ...] | None) -> None:
        """Rows beyond a sequence's length may hold anything: here NaN, unless the memory is shared."""
        for b, length in enumerate(lengths or ()):
            if self.case.layout != "expanded":
                x[b, :, length:] = torch.nan
