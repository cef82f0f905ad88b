"""Bad input gets one clear sentence that says what was given and what is allowed; nothing is written."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention import explain, flash_attention, flash_attention_varlen, workspace_bytes

from .conftest import HAS_CUDA

Q, K, V = (2, 4, 8, 16), (2, 2, 9, 16), (2, 2, 9, 24)


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def by_column(*shape: int) -> Tensor:
    return filled(*shape).mT.contiguous().mT


# What replaces the good arguments, the exception, and the words that matter in it: given and allowed.
Row = tuple[dict[str, Any], type[Exception], tuple[str, ...]]
DENSE: dict[str, Row] = {
    "q of rank 3": ({"q": filled(4, 8, 16)}, ValueError, ("q has shape [4, 8, 16]", "(batch, heads, length")),
    "q of rank 5": ({"q": filled(1, *Q)}, ValueError, ("q has shape [1, 2, 4, 8, 16]",)),
    "q of rank 0": ({"q": torch.tensor(1.0)}, ValueError, ("q has shape []",)),
    "k of rank 2": ({"k": filled(9, 16)}, ValueError, ("k has shape [9, 16]",)),
    "heads that do not divide": ({"q": filled(2, 5, 8, 16)}, ValueError, ("heads_q 5, heads_kv 2", "multiple")),
    "more key heads than query heads": ({"q": filled(2, 1, 8, 16)}, ValueError, ("heads_q 1, heads_kv 2", "multiple")),
    "no heads": ({"q": filled(2, 0, 8, 16)}, ValueError, ("heads_q 0", "between 1 and")),
    "heads of k and v": ({"v": filled(2, 4, 9, 24)}, ValueError, ("v has shape [2, 4, 9, 24]", "[2, 2, 9, 24]")),
    "batch of k": ({"k": filled(3, 2, 9, 16)}, ValueError, ("k has shape [3, 2, 9, 16]", "[2, 2, 9, 16]")),
    "length of v": ({"v": filled(2, 2, 7, 24)}, ValueError, ("v has shape [2, 2, 7, 24]", "[2, 2, 9, 24]")),
    "head_dim of k": ({"k": filled(2, 2, 9, 8)}, ValueError, ("k has shape [2, 2, 9, 8]", "[2, 2, 9, 16]")),
    "head_dim 0": ({"q": filled(2, 4, 8, 0), "k": filled(2, 2, 9, 0)}, ValueError, ("head_dim 0", "1 and 512")),
    "head_dim 513": ({"q": filled(2, 4, 8, 513), "k": filled(2, 2, 9, 513)}, ValueError, ("head_dim 513", "1 and 512")),
    "head_dim_v 513": ({"v": filled(2, 2, 9, 513)}, ValueError, ("head_dim_v 513", "1 and 512")),
    "mixed dtypes": ({"k": filled(*K).half()}, TypeError, ("k is Half", "q is Float", "one dtype")),
    "int": ({"q": filled(*Q).int(), "k": filled(*K).int(), "v": filled(*V).int()}, TypeError, ("q is Int", "float32")),
    "complex": ({"q": filled(*Q).cfloat()}, TypeError, ("ComplexFloat",)),
    "mixed devices": ({"k": filled(*K).to("meta")}, ValueError, ("k is on meta", "q is on cpu", "one device")),
    "last axis of q": ({"q": by_column(*Q)}, ValueError, ("q has strides", "last axis must be contiguous")),
    "last axis of v": ({"v": by_column(*V)}, ValueError, ("v has strides", "last axis must be contiguous")),
    "NaN scale": ({"softmax_scale": math.nan}, ValueError, ("softmax_scale nan", "finite")),
    "infinite scale": ({"softmax_scale": math.inf}, ValueError, ("softmax_scale inf", "finite")),
    "negative softcap": ({"softcap": -1.0}, ValueError, ("softcap -1", "positive")),
    "NaN softcap": ({"softcap": math.nan}, ValueError, ("softcap nan", "positive")),
    "negative left window": ({"window_size": (-2, 0)}, ValueError, ("window_size (-2, 0)", ">= 0", "-1")),
    "negative right window": ({"window_size": (0, -7)}, ValueError, ("window_size (0, -7)", ">= 0", "-1")),
    "dropout_p below 0": ({"dropout_p": -0.1}, ValueError, ("dropout_p -0.1", "[0, 1)")),
    "dropout_p 1": ({"dropout_p": 1.0}, ValueError, ("dropout_p 1", "[0, 1)")),
    "NaN dropout_p": ({"dropout_p": math.nan}, ValueError, ("dropout_p nan", "[0, 1)")),
    "seed of two": ({"dropout_p": 0.5, "seed": torch.ones(2).long()}, ValueError, ("seed has shape [2]", "one")),
    "int32 seed": ({"dropout_p": 0.5, "seed": int32(1)}, TypeError, ("seed is Int", "int64")),
    "fractional seed": ({"dropout_p": 0.5, "seed": 1.5}, TypeError, ("seed",)),
    "bias shape": ({"bias": filled(3, 9)}, ValueError, ("bias has shape [3, 9]", "broadcast", "[2, 4, 8, 9]")),
    "bias of rank 5": ({"bias": filled(1, 1, 1, 8, 9)}, ValueError, ("bias has shape [1, 1, 1, 8, 9]", "broadcast")),
    "bias dtype": ({"bias": filled(8, 9).double()}, TypeError, ("bias is float64", "float32")),
    "bool bias": ({"bias": filled(8, 9) > 0}, TypeError, ("bias is Bool",)),
    "slopes of another length": ({"alibi_slopes": filled(3)}, ValueError, ("alibi_slopes has shape [3]", "= [4]")),
    "slopes of another batch": ({"alibi_slopes": filled(3, 4)}, ValueError, ("alibi_slopes has shape [3, 4]",)),
    "slopes dtype": ({"alibi_slopes": filled(4).half()}, TypeError, ("alibi_slopes is float16", "float32")),
    "sinks of another length": ({"sinks": filled(5)}, ValueError, ("sinks has shape [5]", "(Hq,) = [4]")),
    "sinks for each sequence": ({"sinks": filled(2, 4)}, ValueError, ("sinks has shape [2, 4]", "(Hq,) = [4]")),
    "sinks dtype": ({"sinks": filled(4).half()}, TypeError, ("sinks is float16", "float32")),
    "int64 seqlens": ({"seqlens_k": torch.tensor([1, 2])}, TypeError, ("seqlens_k is Long", "int32")),
    "seqlens count": ({"seqlens_k": int32(9)}, ValueError, ("seqlens_k has shape [1]", "(2,)")),
    "seqlens beyond": ({"seqlens_k": int32(1, 10)}, ValueError, ("seqlens_k[1] = 10", "9 rows")),
    "negative seqlens": ({"seqlens_q": int32(-1, 8)}, ValueError, ("seqlens_q[0] = -1", "0")),
    "list for q": ({"q": [[1.0]]}, TypeError, ("q is list", "a tensor")),
    "list for q with dropout": ({"q": [[1.0]], "dropout_p": 0.5}, TypeError, ("q is list", "a tensor")),
    "None for v": ({"v": None}, TypeError, ("v is NoneType", "a tensor")),
    "number for bias": ({"bias": 1.0}, TypeError, ("bias is float", "a tensor")),
    "string for softcap": ({"softcap": "2"}, TypeError, ("softcap is str", "a number")),
    "None for dropout_p": ({"dropout_p": None}, TypeError, ("dropout_p is NoneType", "a number")),
    "tensor for scale": ({"softmax_scale": filled(1)}, TypeError, ("softmax_scale is Tensor", "a number")),
    "fractional window": ({"window_size": (1.5, 0)}, TypeError, ("window_size is float", "made of ints")),
    "number for window": ({"window_size": 5}, TypeError, ("window_size is int", "(left, right)")),
    "None for window": ({"window_size": None}, TypeError, ("window_size is NoneType", "(left, right)")),
    "window of three": ({"window_size": (1, 2, 3)}, ValueError, ("window_size (1, 2, 3)", "(left, right)")),
    "window beyond 64 bits": ({"window_size": (2**63, 0)}, ValueError, ("window_size 9223372036854775808", "64 bits")),
    "None for impl": ({"impl": None}, TypeError, ("impl is NoneType", "a string")),
    "unknown impl": ({"impl": "best"}, ValueError, ("impl 'best'", "auto, reference, naive")),
    "impl of another device": ({"impl": "hopper"}, ValueError, ("impl 'hopper' cannot serve this request: ",)),
}  # fmt: skip
PACKED: dict[str, Row] = {
    "dense q": ({"q": filled(*Q)}, ValueError, ("q has shape [2, 4, 8, 16]", "(tokens, heads, head_dim)")),
    "decreasing": ({"cu_seqlens_q": int32(0, 6, 4)}, ValueError, ("cu_seqlens_q[2] = 4 after 6", "not decrease")),
    "negative": ({"cu_seqlens_q": int32(0, -4, 10)}, ValueError, ("cu_seqlens_q[1] = -4",)),
    "beyond q": ({"cu_seqlens_q": int32(0, 4, 11)}, ValueError, ("cu_seqlens_q[2] = 11", "beyond", "10 rows")),
    "beyond k": ({"cu_seqlens_k": int32(0, 4, 13)}, ValueError, ("cu_seqlens_k[2] = 13", "beyond", "12 rows")),
    "first not 0": ({"cu_seqlens_k": int32(1, 4, 12)}, ValueError, ("cu_seqlens_k[0] = 1", "must be 0")),
    "int64": ({"cu_seqlens_q": torch.tensor([0, 4, 10])}, TypeError, ("cu_seqlens_q is Long", "int32")),
    "other count": ({"cu_seqlens_k": int32(0, 12)}, ValueError, ("cu_seqlens_k has shape [2]", "(3,)")),
    "none": ({"cu_seqlens_q": int32(), "cu_seqlens_k": int32()}, ValueError, ("no element", "(B + 1,)")),
    "max_seqlen_q too small": ({"max_seqlen_q": 5}, ValueError, ("sequence 1 has 6 rows", "max_seqlen 5")),
    "max_seqlen_k too small": ({"max_seqlen_k": 7}, ValueError, ("sequence 1 has 8 rows", "max_seqlen 7")),
    "negative max_seqlen": ({"max_seqlen_k": -1}, ValueError, ("seqlen_k -1", "between 0")),
    "rows of k and v": ({"v": filled(9, 2, 24)}, ValueError, ("v has shape [9, 2, 24]", "[12, 2, 24]")),
    "heads": ({"q": filled(10, 3, 16)}, ValueError, ("heads_q 3, heads_kv 2", "multiple")),
    "slopes": ({"alibi_slopes": filled(3, 4)}, ValueError, ("alibi_slopes has shape [3, 4]", "(B, Hq)")),
}  # fmt: skip


def assert_refused(call: Callable[..., Any], good: dict[str, Any], row: Row) -> None:
    replaced, exception, words = row
    arguments = {**good, **replaced}
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor) and x.device.type != "meta"}
    with pytest.raises(exception) as caught:
        call(**arguments)
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert len(sentence.splitlines()) == 1, sentence
    assert all(torch.equal(x, arguments[name]) for name, x in before.items())


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("call", [flash_attention, workspace_bytes, explain], ids=lambda call: call.__name__)
def test_bad_input_is_refused_in_one_sentence(call: Callable[..., Any], name: str) -> None:
    if call is not flash_attention and name in ("seqlens beyond", "negative seqlens", "impl of another device"):
        pytest.skip("lengths are not read, and explain() says why an impl is refused, where nothing is computed")
    if call is not flash_attention and name == "mixed devices":
        pytest.skip("meta tensors are computed with by flash_attention() alone")
    assert_refused(call, {"q": filled(*Q), "k": filled(*K), "v": filled(*V)}, DENSE[name])


@pytest.mark.parametrize("name", PACKED)
def test_bad_packed_input_is_refused_in_one_sentence(name: str) -> None:
    good = {"q": filled(10, 4, 16), "k": filled(12, 2, 16), "v": filled(12, 2, 24)}
    good |= {"cu_seqlens_q": int32(0, 4, 10), "cu_seqlens_k": int32(0, 4, 12)}
    good |= {"max_seqlen_q": 6, "max_seqlen_k": 8}
    flash_attention_varlen(**good)
    assert_refused(flash_attention_varlen, good, PACKED[name])


def test_a_misspelt_argument_is_refused() -> None:
    q, k, v = filled(*Q), filled(*K), filled(*V)
    with pytest.raises(TypeError, match="casual"):
        flash_attention(q, k, v, casual=True)


@pytest.mark.skipif(not torch.cuda.is_available() or HAS_CUDA, reason="needs a GPU and a build without its kernels")
def test_a_build_without_cuda_says_how_to_get_it() -> None:
    q = filled(*Q).cuda()
    with pytest.raises(ValueError, match="q is on cuda:0 and this build has kernels for the CPU alone: .*FA_CUDA=1"):
        flash_attention(q, q, q)


def test_a_refused_call_leaves_the_next_one_alone() -> None:
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    expected = flash_attention(q, k, v)
    with pytest.raises(ValueError):
        flash_attention(q, k, v, dropout_p=2.0)
    assert torch.equal(flash_attention(q, k, v), expected)
    assert q.grad is None
