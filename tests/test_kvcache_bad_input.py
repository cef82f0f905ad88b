"""Bad input over a key/value cache gets one clear sentence; nothing is written, neither to the caches nor to out."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention import explain_with_kvcache, flash_attention_with_kvcache, workspace_bytes_with_kvcache

from .test_bad_input import Row, assert_refused, by_column, filled, int32

Q, NEW, K_CACHE, V_CACHE = (2, 4, 3, 16), (2, 2, 3, 16), (2, 2, 9, 16), (2, 2, 9, 24)
half, float8 = torch.float16, torch.float8_e4m3fn
IN_HALF = {name: filled(*shape, dtype=half) for name, shape in (("q", Q), ("k", NEW), ("v", (2, 2, 3, 24)))}
IN_FLOAT8 = {name: filled(*shape).to(float8) for name, shape in (("k_cache", K_CACHE), ("v_cache", V_CACHE))}
COS = filled(9, 8)
PAGED = {
    "k_cache": filled(7, 2, 4, 16),
    "v_cache": filled(7, 2, 4, 24),
    "page_table": int32(0, 1, 2, 3, 4, 5).view(2, 3),
}
ALL_TRUE = filled(3, 3) > 0


def good() -> dict[str, Any]:
    return {
        "q": filled(*Q),
        "k_cache": filled(*K_CACHE),
        "v_cache": filled(*V_CACHE),
        "k": filled(*NEW) * 2,
        "v": filled(2, 2, 3, 24) * 2,
        "cache_seqlens": int32(6, 0),
        "out": filled(2, 4, 3, 24) * 3,
    }


ROWS: dict[str, Row] = {
    "q of rank 3": ({"q": filled(4, 3, 16)}, ValueError, ("q has shape [4, 3, 16]", "(batch, heads, length")),
    "q of rank 0": ({"q": torch.tensor(1.0)}, ValueError, ("q has shape []",)),
    "k_cache of rank 2": ({"k_cache": filled(9, 16)}, ValueError, ("k_cache has shape [9, 16]",)),
    "v_cache of rank 0": ({"v_cache": torch.tensor(1.0)}, ValueError, ("v_cache has shape []",)),
    "heads that do not divide": ({"q": filled(2, 5, 3, 16), "out": None}, ValueError, ("heads_q 5, heads_kv 2",)),
    "heads of the caches": ({"v_cache": filled(2, 4, 9, 24)},
        ValueError, ("v_cache has shape [2, 4, 9, 24]", "[2, 2, 9, 24]")),
    "lengths of the caches": ({"v_cache": filled(2, 2, 8, 24)}, ValueError, ("v_cache has shape [2, 2, 8, 24]",)),
    "head_dim of k_cache": ({"k_cache": filled(2, 2, 9, 8)},
        ValueError, ("k_cache has shape [2, 2, 9, 8]", "[2, 2, 9, 16]")),
    "head_dim 513": ({"q": filled(2, 4, 3, 513), "k_cache": filled(2, 2, 9, 513), "k": filled(2, 2, 3, 513)},
        ValueError, ("head_dim 513", "1 and 512")),
    "fewer caches than sequences": ({"k_cache": filled(1, 2, 9, 16), "v_cache": filled(1, 2, 9, 24)},
        ValueError, ("k_cache has 1 entries", "2 sequences")),
    "batch of k": ({"k": filled(3, 2, 3, 16)},
        ValueError, ("k has shape [3, 2, 3, 16]", "(B, Hkv, Lq, D) = [2, 2, 3, 16]")),
    "length of v": ({"v": filled(2, 2, 4, 24)}, ValueError, ("v has shape [2, 2, 4, 24]", "[2, 2, 3, 24]")),
    "k alone": ({"v": None}, ValueError, ("k and v", "both or neither")),
    "v alone": ({"k": None}, ValueError, ("k and v", "both or neither")),
    "integers": ({"q": filled(*Q).int()}, TypeError, ("q is Int", "float32")),
    "dtype of the caches": ({"k_cache": filled(*K_CACHE).half()},
        TypeError, ("k_cache is Half", "q is Float", "float8_e4m3fn")),
    "int8 caches": ({"k_cache": filled(*K_CACHE).char()}, TypeError, ("k_cache is Char", "float8_e4m3fn")),
    "float8 with float32": (IN_FLOAT8, TypeError, ("k_cache is float8_e4m3fn", "q is float32")),
    "one float8 cache": ({**IN_HALF, **IN_FLOAT8, "v_cache": filled(*V_CACHE).half(), "out": None},
        TypeError, ("v_cache is Half", "k_cache is Float8_e4m3fn", "one dtype")),
    "float8 q": ({"q": filled(*Q).to(float8)}, TypeError, ("q is Float8_e4m3fn", "float32")),
    "dtype of k": ({"k": filled(*NEW).half()}, TypeError, ("k is Half", "q is Float", "one dtype")),
    "another device": ({"v_cache": filled(*V_CACHE).to("meta")}, ValueError, ("v_cache is on meta", "q is on cpu")),
    "last axis of q": ({"q": by_column(*Q)}, ValueError, ("q has strides", "last axis must be contiguous")),
    "last axis of v_cache": ({"v_cache": by_column(*V_CACHE)},
        ValueError, ("v_cache has strides", "last axis must be contiguous")),
    "a cache shared by all": ({"k_cache": filled(1, 2, 9, 16).expand(*K_CACHE)},
        ValueError, ("k_cache has strides [0,", "share memory")),
    "no lengths": ({"cache_seqlens": None}, TypeError, ("cache_seqlens is NoneType", "int32 tensor, or one int")),
    "int64 lengths": ({"cache_seqlens": torch.tensor([6, 0])}, TypeError, ("cache_seqlens is Long", "int32")),
    "count of lengths": ({"cache_seqlens": int32(6)}, ValueError, ("cache_seqlens has shape [1]", "(2,)")),
    "negative length": ({"cache_seqlens": int32(6, -1)},
        ValueError, ("cache_seqlens[1] = -1", "between 0 and the 9 tokens")),
    "length beyond": ({"cache_seqlens": int32(10, 0)},
        ValueError, ("cache_seqlens[0] = 10", "between 0 and the 9 tokens")),
    "no room for the new": ({"cache_seqlens": int32(0, 7)},
        ValueError, ("cache_seqlens[1] = 7 and 3 new tokens", "9 tokens")),
    "one length beyond": ({"cache_seqlens": 10}, ValueError, ("cache_seqlens[0] = 10", "9 tokens")),
    "a length beyond 32 bits": ({"cache_seqlens": 2**31}, ValueError, ("cache_seqlens 2147483648", "32 bits")),
    "two tables": ({**PAGED, "cache_batch_idx": int32(0, 1)}, ValueError, ("page_table and cache_batch_idx", "one")),
    "int64 table": ({**PAGED, "page_table": torch.zeros(2, 3).long()}, TypeError, ("page_table is Long", "int32")),
    "table of rank 1": ({**PAGED, "page_table": int32(0, 1)},
        ValueError, ("page_table has shape [2]", "(B, max_pages), B = 2")),
    "rows of the table": ({**PAGED, "page_table": int32(0, 1, 2).view(1, 3)},
        ValueError, ("page_table has shape [1, 3]", "B = 2")),
    "strides of the table": ({**PAGED, "page_table": int32(0, 1, 2, 3, 4, 5).view(3, 2).T},
        ValueError, ("page_table has strides [1, 2]", "contiguous")),
    "page beyond": ({**PAGED, "page_table": int32(0, 1, 7, 3, 4, 5).view(2, 3)},
        ValueError, ("page_table", "sequence 0: page 2 is 7", "0 and 6")),
    "negative page": ({**PAGED, "page_table": int32(0, 1, 2, -1, 4, 5).view(2, 3)},
        ValueError, ("sequence 1: page 0 is -1",)),
    "more tokens than pages": ({**PAGED, "cache_seqlens": int32(0, 10)},
        ValueError, ("cache_seqlens[1] = 10 and 3 new tokens", "12 tokens")),
    "index beyond": ({"cache_batch_idx": int32(0, 2)},
        ValueError, ("cache_batch_idx", "sequence 1", "is 2", "0 and 1")),
    "count of indices": ({"cache_batch_idx": int32(0)}, ValueError, ("cache_batch_idx has shape [1]", "(B,) = [2]")),
    "int64 indices": ({"cache_batch_idx": torch.tensor([0, 1])}, TypeError, ("cache_batch_idx is Long", "int32")),
    "cos alone": ({"rotary_cos": COS}, ValueError, ("rotary_cos and rotary_sin", "both or neither")),
    "rotary without k": ({"rotary_cos": COS, "rotary_sin": COS, "k": None, "v": None},
        ValueError, ("rotary_cos", "need k")),
    "too few positions": ({"rotary_cos": filled(8, 8), "rotary_sin": filled(8, 8)},
        ValueError, ("rotary_cos has 8 positions", "9 tokens")),
    "rotary_dim beyond": ({"rotary_cos": filled(9, 9), "rotary_sin": filled(9, 9)},
        ValueError, ("rotary_dim 18", "head_dim 16")),
    "rotary_dim 0": ({"rotary_cos": filled(9, 0), "rotary_sin": filled(9, 0)},
        ValueError, ("rotary_dim 0", "between 2")),
    "shapes of cos and sin": ({"rotary_cos": COS, "rotary_sin": filled(9, 7)},
        ValueError, ("rotary_sin has shape [9, 7]", "[9, 8]")),
    "dtypes of cos and sin": ({"rotary_cos": COS, "rotary_sin": COS.half()},
        TypeError, ("rotary_sin is Half", "rotary_cos is Float")),
    "dtype of cos": ({"rotary_cos": COS.half(), "rotary_sin": COS.half()},
        TypeError, ("rotary_cos is float16", "float32")),
    "rank of cos": ({"rotary_cos": filled(1, 9, 8), "rotary_sin": COS},
        ValueError, ("rotary_cos has shape [1, 9, 8]", "(positions, rotary_dim / 2)")),
    "uint8 tree": ({"tree_mask": ALL_TRUE.byte()}, TypeError, ("tree_mask is Byte", "bool")),
    "tree of other tokens": ({"tree_mask": filled(3, 4) > 0},
        ValueError, ("tree_mask has shape [3, 4]", "(Lq, Lq) or (B, Lq, Lq) = [2, 3, 3]")),
    "tree of another batch": ({"tree_mask": filled(1, 3, 3) > 0}, ValueError, ("tree_mask has shape [1, 3, 3]",)),
    "strides of the tree": ({"tree_mask": (filled(3, 6) > 0)[:, :3]},
        ValueError, ("tree_mask has strides [6, 1]", "contiguous")),
    "descale without float8": ({"k_descale": filled(2)}, ValueError, ("k_descale", "float8_e4m3fn")),
    "shape of descale": ({**IN_HALF, **IN_FLOAT8, "v_descale": filled(4), "out": None},
        ValueError, ("v_descale has shape [4]", "(Hkv,) = [2] or (B, Hkv)")),
    "dtype of descale": ({**IN_HALF, **IN_FLOAT8, "k_descale": filled(2).half(), "out": None},
        TypeError, ("k_descale is float16", "float32")),
    "slopes": ({"alibi_slopes": filled(3)}, ValueError, ("alibi_slopes has shape [3]", "(Hq,) = [4]")),
    "sinks": ({"sinks": filled(4).half()}, TypeError, ("sinks is float16", "float32")),
    "NaN scale": ({"softmax_scale": math.nan}, ValueError, ("softmax_scale nan", "finite")),
    "negative softcap": ({"softcap": -1.0}, ValueError, ("softcap -1", "positive")),
    "negative window": ({"window_size": (-2, 0)}, ValueError, ("window_size (-2, 0)", ">= 0")),
    "window of one": ({"window_size": (2,)}, ValueError, ("window_size (2,)", "(left, right)")),
    "negative num_splits": ({"num_splits": -1}, ValueError, ("num_splits -1", "1 and 1024")),
    "num_splits of 1025": ({"num_splits": 1025}, ValueError, ("num_splits 1025", "1 and 1024")),
    "fractional num_splits": ({"num_splits": 1.5}, TypeError, ("num_splits is float", "an int")),
    "shape of out": ({"out": filled(2, 4, 3, 16)},
        ValueError, ("out has shape [2, 4, 3, 16]", "(B, Hq, Lq, Dv) = [2, 4, 3, 24]")),
    "dtype of out": ({"out": filled(2, 4, 3, 24).half()}, TypeError, ("out is Half", "q is Float")),
    "last axis of out": ({"out": by_column(2, 4, 3, 24)},
        ValueError, ("out has strides", "last axis must be contiguous")),
    "out that is one row": ({"out": filled(24).expand(2, 4, 3, 24)},
        ValueError, ("out has strides [0, 0, 0, 1]", "share memory")),
    "list for q": ({"q": [[1.0]]}, TypeError, ("q is list", "a tensor")),
    "list for k_cache": ({"k_cache": [[1.0]]}, TypeError, ("k_cache is list", "a tensor")),
    "number for page_table": ({"page_table": 1}, TypeError, ("page_table is int", "a tensor")),
    "unknown impl": ({"impl": "best"}, ValueError, ("impl 'best'", "auto, reference, naive")),
    "impl that has none": ({"impl": "naive"},
        ValueError, ("impl 'naive' cannot serve this request: ", "no attention over a cache")),
}  # fmt: skip
READ_BY_KERNELS = {  # of what is only looked at where something is computed
    *("negative length", "length beyond", "no room for the new", "one length beyond", "page beyond", "negative page"),
    *("more tokens than pages", "index beyond", "another device"),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_is_refused_in_one_sentence(name: str) -> None:
    assert_refused(flash_attention_with_kvcache, good(), ROWS[name])


@pytest.mark.parametrize("name", [name for name in ROWS if name not in READ_BY_KERNELS])
@pytest.mark.parametrize("call", [explain_with_kvcache, workspace_bytes_with_kvcache], ids=lambda call: call.__name__)
def test_asking_about_bad_input_is_refused_in_the_same_words(call: Callable[..., Any], name: str) -> None:
    if name == "impl that has none" and call is explain_with_kvcache:
        pytest.skip("it says why an impl is refused")
    assert_refused(call, good(), ROWS[name])


def test_good_input_is_taken() -> None:
    arguments = good()
    assert flash_attention_with_kvcache(**arguments) is arguments["out"]
    assert not arguments["out"].equal(good()["out"]) and not arguments["k_cache"].equal(good()["k_cache"])


def test_a_misspelt_argument_is_refused() -> None:
    for call in (flash_attention_with_kvcache, explain_with_kvcache, workspace_bytes_with_kvcache):
        with pytest.raises(TypeError, match="casual"):
            call(**good(), casual=True)


def test_a_call_with_gradients_says_that_there_is_no_backward() -> None:
    for name in ("q", "k", "v", "out"):
        arguments = good()
        arguments[name].requires_grad_()
        before = {key: x.clone() for key, x in arguments.items()}
        with pytest.raises(NotImplementedError, match=r"has no backward: call it under torch\.no_grad\(\)"):
            flash_attention_with_kvcache(**arguments)
        assert all(torch.equal(x, arguments[key]) for key, x in before.items())
        with torch.no_grad():
            o = flash_attention_with_kvcache(**arguments)
        assert isinstance(o, Tensor) and o.grad_fn is None


@pytest.mark.filterwarnings("ignore:.torch.jit.script(_method)?. is deprecated")
def test_a_forward_mode_derivative_is_refused_rather_than_zero() -> None:
    arguments = good()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: flash_attention_with_kvcache(**{**arguments, "q": q}), (filled(*Q),), (filled(*Q),))
