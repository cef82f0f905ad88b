"""The same attention as torch.nn modules, which share one signature."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flash_attention.interface import flash_attention
from flash_attention.reference import standard_attention


class FlashAttention(nn.Module):
    """flash_attention() as a module without parameters.

    Args:
        defaults: keyword arguments of flash_attention(), for every call; a call's own take precedence.
    """

    def __init__(self, **defaults: Any) -> None:
        super().__init__()
        self.defaults = defaults

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) -> o (B, Hq, Lq, Dv); (o, lse) with return_lse=True.

        Dropout is applied in training mode only. Raises what flash_attention() raises.
        """
        options = {**self.defaults, **options}
        if not self.training:
            options["dropout_p"] = 0.0
        return self._attention(q, k, v, **options)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        return flash_attention(q, k, v, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.defaults.items())


class StandardAttention(FlashAttention):
    """The same semantics in plain PyTorch operations, with the score matrix in memory: the baseline.

    Takes the keyword arguments of flash_attention(); `impl` and `deterministic` change nothing here.
    """

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        for name in ("impl", "deterministic"):
            options.pop(name, None)
        return standard_attention(q, k, v, **options)
