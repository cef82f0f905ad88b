"""Every implementation that can be measured, by name: our kernels, and PyTorch's as peers.

An implementation that cannot serve a problem says why by raising; measure turns that into the row's status.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from flash_attention.reference import standard_attention

from . import flex
from .problem import renamed

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None


def _no_varlen(*_: Any, **__: Any) -> Tensor:
    raise NotImplementedError("not measured on packed sequences")


def _as_given(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> dict[str, Any]:
    return options


@dataclasses.dataclass(frozen=True)
class Implementation:
    """attention(q, k, v, **prepare(q, k, v, **options)) -> o, or varlen for packed sequences, called inside context();
    prepare and context are outside the timed region."""

    name: str
    attention: Callable[..., Tensor]
    varlen: Callable[..., Tensor] = _no_varlen
    prepare: Callable[..., dict[str, Any]] = _as_given  # what is made once for many calls
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    stores_scores: bool = False  # the B x Hq x Lq x Lk matrix is in memory
    compiles: bool = False  # for seconds, in its first call with these sizes and options
    draws_own_bits: bool = False  # of dropout: its results are those of no oracle
    is_ours: bool = False
    release: Callable[[], None] = lambda: None  # gives back what is kept from one call to the next


def _ours(impl: str) -> Implementation:
    try:
        from flash_attention import flash_attention, flash_attention_varlen
    except ImportError as error:  # not built: the peers can still be measured
        reason = f"flash_attention is not built: {error}"

        def flash_attention(*_: Any, **__: Any) -> Tensor:
            raise RuntimeError(reason)

        flash_attention_varlen = flash_attention

    attention, varlen = (
        functools.partial(function, impl=impl) for function in (flash_attention, flash_attention_varlen)
    )
    stores_scores = impl in ("reference", "naive", "split")
    return Implementation(impl, attention, varlen, stores_scores=stores_scores, is_ours=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **options: Any) -> Tensor:
    """F.scaled_dot_product_attention; its own is_causal is aligned top-left, ours bottom-right."""
    known = {"softmax_scale": "scale", "dropout_p": "dropout_p", "bias": "attn_mask"}
    kwargs = renamed(options, known, "PyTorch's SDPA")
    if causal and q.shape[2] > 1:  # one query sees every key
        if q.shape[2] == k.shape[2]:
            kwargs["is_causal"] = True
        else:
            kwargs["attn_mask"] = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kwargs)


def _flash_varlen(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **options: Any) -> Tensor:
    """PyTorch's flash kernel over packed sequences; its causal mask is aligned as ours."""
    if q.device.type == "cpu" or varlen_attn is None:
        raise NotImplementedError("PyTorch's varlen_attn needs a GPU and PyTorch 2.11")
    lengths = [options.pop(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    kwargs = renamed(options, {"softmax_scale": "scale"}, "PyTorch's varlen_attn")
    return varlen_attn(q, k, v, *lengths, window_size=(-1, 0 if causal else -1), **kwargs)


def _sdpa_through_float32(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    if q.dtype == torch.float32:
        raise NotImplementedError("float32 inputs are what torch_flash is for")
    return _sdpa(q.float(), k.float(), v.float(), **options).to(q.dtype)


def _megatron(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """The unfused attention of Megatron-LM's CoreAttention: baddbmm with a score tensor that stays from call to call,
    scale-mask-softmax with a mask made once, bmm. Source: megatron/model/transformer.py, GlobalMemoryBuffer."""
    (batch, heads, seqlen_q, head_dim), seqlen_k = q.shape, k.shape[2]
    if heads != k.shape[1]:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    buffer, hidden = _megatron_buffers(batch * heads, seqlen_q, seqlen_k, q.dtype, q.device)
    scores = torch.baddbmm(buffer, q, k.transpose(1, 2), beta=0.0, alpha=head_dim**-0.5)
    if causal:
        scores.masked_fill_(hidden, -10000.0)
    return torch.bmm(torch.softmax(scores, dim=-1), v).unflatten(0, (batch, heads))


@functools.lru_cache(maxsize=1)
def _megatron_buffers(
    heads: int, seqlen_q: int, seqlen_k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The score tensor and the causal mask."""
    hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device).triu(seqlen_k - seqlen_q + 1)
    return torch.empty(heads, seqlen_q, seqlen_k, dtype=dtype, device=device), hidden


def _torch(
    backend: SDPBackend, attention: Callable[..., Tensor] = _sdpa, **kwargs: Any
) -> Callable[[str], Implementation]:
    # One backend alone: what it cannot do raises instead of falling back.
    context = functools.partial(sdpa_kernel, backend)
    return lambda name: Implementation(name, attention, context=context, draws_own_bits=True, **kwargs)


_BUILDERS: dict[str, Callable[[str], Implementation]] = {
    "reference": _ours,
    "naive": _ours,
    "split": _ours,
    "fused": _ours,
    "tensor_core": _ours,
    "hopper": _ours,
    "auto": _ours,
    "torch_flash": _torch(SDPBackend.FLASH_ATTENTION, varlen=_flash_varlen),
    # 16-bit inputs through float32 and back: PyTorch's best where a CPU has no 16-bit matrix units.
    "torch_flash_float32": _torch(SDPBackend.FLASH_ATTENTION, _sdpa_through_float32),
    "torch_cudnn": _torch(SDPBackend.CUDNN_ATTENTION),
    "torch_efficient": _torch(SDPBackend.EFFICIENT_ATTENTION),
    "flex": lambda name: Implementation(name, flex.attention, prepare=flex.prepare, compiles=True),
    "torch_math": _torch(SDPBackend.MATH, stores_scores=True),
    "torch_unfused": lambda name: Implementation(name, standard_attention, stores_scores=True),
    "megatron": lambda name: Implementation(name, _megatron, stores_scores=True, release=_megatron_buffers.cache_clear),
}
ALIASES = {"ext": "split", "online": "fused"}
NAMES = tuple(_BUILDERS)
OURS = tuple(name for name, builder in _BUILDERS.items() if builder is _ours)


@functools.cache
def find(name: str) -> Implementation:
    """The implementation of a name in NAMES."""
    return _BUILDERS[name](name)


def defaults(device: str) -> list[str]:
    """What a sweep compares on a device ("cpu" or "cuda"): every implementation that exists for it."""
    if device == "cpu":
        return ["naive", "fused", "torch_flash", "torch_math", "torch_unfused"]
    cuda = ["naive", "split", "fused", "tensor_core", "hopper", "torch_flash", "torch_cudnn", "torch_efficient"]
    return present([*cuda, "torch_math", "torch_unfused", "megatron"], device)


def present(names: Sequence[str], device: str) -> list[str]:
    """Without those of our kernels that this build does not have for the device."""
    try:
        from flash_attention import _C
    except ImportError:  # not built: each row says so
        return list(names)
    built = {impl for impl, on in _C.kernels() if on == device}
    return [name for name in names if name not in OURS or name in built or (name == "auto" and built)]


def best_device() -> str:
    """ "cuda" if our kernels run there, else "cpu"."""
    if torch.cuda.is_available():
        q = torch.zeros(1, 1, 1, 64, device="cuda")
        with contextlib.suppress(ValueError, RuntimeError):
            find("auto").attention(q, q, q)
            return "cuda"
    return "cpu"
