"""The custom ops: torch.ops.flash_attention.forward and .backward, their fake kernels and their autograd formula.

Schemas and kernels are registered by the C extension (csrc/bindings.cpp); what is here lets torch.compile, torch.export
and autograd see through them.
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


def _empty_in_layout_of(like: Tensor, width: int) -> Tensor:
    """A tensor of like's sizes but for the last axis, its head and length axes in like's order, as kernels make it."""
    if like.dim() == 3 or like.stride(1) >= like.stride(2):
        return like.new_empty((*like.shape[:-1], width))
    batch, heads, length, _ = like.shape
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


@torch.library.register_fake("flash_attention::forward")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, v = args[_Q], args[_V]
    for name, t in zip(TENSOR_NAMES, args, strict=False):
        if t is not None and t.device != q.device:
            raise ValueError(f"{name} is on {t.device} and q is on {q.device}: all tensors must be on one device")
    packed = args[_CU_SEQLENS_Q] is not None
    lse_shape = (q.shape[1], q.shape[0]) if packed else q.shape[:-1]
    lse = q.new_empty(lse_shape, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return _empty_in_layout_of(q, v.shape[-1]), lse


@torch.library.register_fake("flash_attention::backward")
def _backward_fake(d_o: Tensor, d_lse: Tensor | None, o: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    q, k, v = args[_Q], args[_K], args[_V]
    extras = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and want else q.new_empty((0,))
        for t, want in zip((args[_BIAS], args[_SLOPES], args[_SINKS]), args[-1], strict=True)
    )
    return tuple(_empty_in_layout_of(t, t.shape[-1]) for t in (q, k, v)) + tuple(extras)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:_TENSORS])
    ctx.values = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    o, lse, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if d_o is None and d_lse is None:
        return (None,) * len(needs)
    wanted = [needs[i] and tensors[i] is not None for i in (_BIAS, _SLOPES, _SINKS)]
    gradients = torch.ops.flash_attention.backward(
        torch.zeros_like(o) if d_o is None else d_o, d_lse, o, lse, *tensors, *ctx.values, wanted
    )
    useful = (*needs[:_BIAS], *wanted)
    kept = tuple(g if use else None for g, use in zip(gradients, useful, strict=True))
    return kept + (None,) * (len(needs) - len(kept))


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError("flash_attention has no second derivative: its backward is not differentiable")


torch.library.register_autograd("flash_attention::forward", _backward, setup_context=_setup_context)
torch.library.register_autograd("flash_attention::backward", _no_second_derivative)
