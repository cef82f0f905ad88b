"""The custom ops: torch.ops.flash_attention.forward, .backward and .with_kvcache, and their fake kernels.

Schemas, kernels, autograd and autocast are registered by the C extension (csrc/bindings/); what is here lets
torch.compile and torch.export see the shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from flash_attention import _C  # registers the ops
except ImportError as error:
    raise ImportError(
        f"the C extension is missing, or was built for another torch than {torch.__version__} ({error}): "
        "build it again with `make extension` or `pip install .`"
    ) from error

__version__: str = _C.version

# The forward op's first arguments, which are tensors or None (the rest are plain values), and positions among them.
TENSOR_NAMES = tuple("q k v bias alibi_slopes sinks seqlens_q seqlens_k cu_seqlens_q cu_seqlens_k seed".split())
_TENSORS = len(TENSOR_NAMES)
_Q, _K, _V, _BIAS, _SLOPES, _SINKS, _CU_SEQLENS_Q = 0, 1, 2, 3, 4, 5, 8


def empty_in_layout_of(like: Tensor, width: int) -> Tensor:
    """A tensor of like's sizes but for the last axis, its head and length axes in like's order, as kernels make it."""
    if like.dim() == 3 or like.stride(1) >= like.stride(2):
        return like.new_empty((*like.shape[:-1], width))
    batch, heads, length, _ = like.shape
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def _check_devices(names: tuple[str, ...], args: tuple[Any, ...]) -> None:
    q = args[_Q]
    for name, t in zip(names, args, strict=False):
        if t is not None and t.device != q.device:
            raise ValueError(f"{name} is on {t.device} and q is on {q.device}: all tensors must be on one device")


def _empty_lse(q: Tensor, shape: tuple[int, ...]) -> Tensor:
    return q.new_empty(shape, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("flash_attention::forward")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, v = args[_Q], args[_V]
    _check_devices(TENSOR_NAMES, args)
    packed = args[_CU_SEQLENS_Q] is not None
    lse_shape = (q.shape[1], q.shape[0]) if packed else q.shape[:-1]
    return empty_in_layout_of(q, v.shape[-1]), _empty_lse(q, lse_shape)


@torch.library.register_fake("flash_attention::backward")
def _backward_fake(d_o: Tensor, d_lse: Tensor | None, o: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    q, k, v = args[_Q], args[_K], args[_V]
    extras = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and want else q.new_empty((0,))
        for t, want in zip((args[_BIAS], args[_SLOPES], args[_SINKS]), args[-1], strict=True)
    )
    return tuple(empty_in_layout_of(t, t.shape[-1]) for t in (q, k, v)) + tuple(extras)


_KVCACHE_TENSOR_NAMES = tuple(
    "q k_cache v_cache k v cache_seqlens page_table cache_batch_idx rotary_cos rotary_sin alibi_slopes sinks tree_mask "
    "k_descale v_descale out".split()
)


@torch.library.register_fake("flash_attention::with_kvcache")
def _with_kvcache_fake(*args: Any) -> Tensor:
    q, (return_lse, _) = args[_Q], args[-2:]
    _check_devices(_KVCACHE_TENSOR_NAMES, args)
    return _empty_lse(q, q.shape[:-1] if return_lse else (0,))
