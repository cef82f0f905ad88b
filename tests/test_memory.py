"""The extra memory of `fused` grows with L, never with L x L, and is what workspace_bytes() says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_attention import flash_attention, workspace_bytes

ROOT = Path(__file__).parent.parent


def tensors(
    length: int, device: str, head_dim: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(1, 4, length, head_dim, dtype=dtype, device=device) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backward", [False, True])
def test_workspace_of_fused_grows_linearly_with_the_length(backward: bool, dtype: torch.dtype, device: str) -> None:
    features = {"causal": True, "dropout_p": 0.1, "seed": 0, "sinks": torch.zeros(4, device=device)}
    sizes = [
        workspace_bytes(*tensors(length, device, dtype=dtype), backward=backward, impl="fused", **features)
        for length in (1024, 2048, 4096, 8192)
    ]
    # Affine in L at most: each doubling adds at most twice what the one before added.
    assert sizes[3] - sizes[2] <= 2 * (sizes[2] - sizes[1]) + 4096
    assert sizes[2] - sizes[1] <= 2 * (sizes[1] - sizes[0]) + 4096


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64, 256])
def test_workspace_of_fused_is_a_few_times_the_inputs(head_dim: int, backward: bool, device: str) -> None:
    q, k, v = tensors(4096, device, head_dim)
    inputs = sum(x.numel() for x in (q, k, v)) * 4
    tiles = torch.get_num_threads() * 6 * 2**20 if device == "cpu" else 0  # of each worker
    size = workspace_bytes(q, k, v, backward=backward, impl="fused")
    assert size <= 4 * inputs + tiles  # packed copies and, in the backward, sums


def test_workspace_of_naive_holds_the_scores(device: str) -> None:
    assert workspace_bytes(*tensors(2048, device), impl="naive") >= 2048 * 2048 * 4


# Growth of the peak resident memory over one forward and backward, in bytes.
MEASURE = """
import resource, sys, torch
from flash_attention import flash_attention
length = int(sys.argv[1])
def attend(length):
    leaves = [torch.randn(1, 1, length, 32, requires_grad=True) for _ in range(3)]
    flash_attention(*leaves, causal=True, window_size=(128, 0), impl="fused").sum().backward()
attend(64)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
attend(length)
print(peak() - before)
"""


def test_peak_memory_of_a_long_sequence_stays_far_below_its_scores() -> None:
    length = 32768
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(length)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    tensor_bytes = length * 32 * 4
    # q, k, v, o and their gradients are 8 tensors; the scores would be 4 GiB.
    assert int(done.stdout) < 24 * tensor_bytes + 32 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_on_the_gpu_is_the_results_and_the_workspace(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 1, 32768, 32, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3))
    options = {"causal": True, "window_size": (128, 0), "impl": "fused"}
    scratch = [workspace_bytes(q, k, v, backward=backward, **options) for backward in (False, True)]
    tensor_bytes, lse_bytes = q.numel() * q.element_size(), 4 * q.shape[2]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_attention(q, k, v, **options).sum().backward()
    torch.cuda.synchronize()
    # o, d_o (one number without strides, made whole) and three gradients; some slack for small blocks.
    assert torch.cuda.max_memory_allocated() - before <= 5 * tensor_bytes + lse_bytes + max(scratch) + 2**20
    assert max(scratch) < 12 * tensor_bytes  # the scores would be 4 GiB


@pytest.mark.gpu
def test_a_call_on_the_gpu_keeps_no_memory() -> None:
    q, k, v = (torch.randn(2, 4, 500, 64, device="cuda", requires_grad=True) for _ in range(3))

    def attend() -> int:
        torch.autograd.grad(flash_attention(q, k, v, causal=True, dropout_p=0.1).sum(), (q, k, v))
        return torch.cuda.memory_allocated()

    # The smallest of each: a thread of autograd's may free a call's gradients only after the reading.
    before, after = (min(attend() for _ in range(5)) for _ in range(2))
    assert after == before
