"""Exact attention, forward and backward, without the score matrix in memory."""

from flash_attention.arguments import KernelVerdict
from flash_attention.interface import explain, flash_attention, flash_attention_varlen, workspace_bytes
from flash_attention.kvcache import explain_with_kvcache, flash_attention_with_kvcache, workspace_bytes_with_kvcache
from flash_attention.modules import FlashAttention, StandardAttention
from flash_attention.ops import __version__

__all__ = [
    "FlashAttention",
    "KernelVerdict",
    "StandardAttention",
    "__version__",
    "explain",
    "explain_with_kvcache",
    "flash_attention",
    "flash_attention_varlen",
    "flash_attention_with_kvcache",
    "workspace_bytes",
    "workspace_bytes_with_kvcache",
]
