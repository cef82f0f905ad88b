"""Exact attention, forward and backward, without the score matrix in memory."""

from flash_attention.interface import (
    KernelVerdict,
    explain,
    flash_attention,
    flash_attention_varlen,
    workspace_bytes,
)
from flash_attention.modules import FlashAttention, StandardAttention
from flash_attention.ops import __version__

__all__ = [
    "FlashAttention",
    "KernelVerdict",
    "StandardAttention",
    "__version__",
    "explain",
    "flash_attention",
    "flash_attention_varlen",
    "workspace_bytes",
]
