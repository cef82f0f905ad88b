"""flash_attention_with_kvcache() under torch.compile, opcheck, inference mode and autograd's book-keeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention import explain_with_kvcache, flash_attention_with_kvcache, workspace_bytes_with_kvcache

from .cache_cases import CacheCase
from .cache_checks import same_bits
from .test_torch_integration import Recorder, Watched

CASES = (
    CacheCase(),
    CacheCase("bf16", append=False, page_size=16, heads_q=8, layout="blhd"),
    CacheCase("f16", float8=True, descale="bh", rotary="halves", seqlen_q=3, batch_idx=True),
    CacheCase("f32", tree="each", alibi="bh", sinks=True, seqlen_q=5, page_size=3, softcap=9.0, window=(30, 4)),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script(_method)?. is deprecated")


def without_nan(arguments: dict[str, Any]) -> dict[str, Any]:
    """Caches that equal themselves."""
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].float().nan_to_num(1).to(arguments[name].dtype)
    return arguments


@each_case
@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck_passes(case: CacheCase, return_lse: bool) -> None:
    with Recorder() as recorder:
        flash_attention_with_kvcache(**without_nan(case.inputs()), return_lse=return_lse)
    ((op, arguments),) = recorder.calls
    assert str(op) == "flash_attention.with_kvcache.default"
    names = ("test_autograd_registration", "test_faketensor")  # the others compare tensors, for which float8 has no mul
    torch.library.opcheck(op, arguments, **{"test_utils": names} if case.float8 else {})


def steps(arguments: dict[str, Any], call: Callable[..., Any]) -> list[Tensor]:
    """Three, each from the results of the one before; all that they wrote."""
    results = []
    for _ in range(3):
        o, lse = call(**arguments)
        results += [o, lse]
        arguments = {**arguments, "q": o.clone()}
    return [*results, arguments["k_cache"], arguments["v_cache"]]


def step(**arguments: Any) -> tuple[Tensor, Tensor]:
    o, lse = flash_attention_with_kvcache(**{**arguments, "q": arguments["q"] * 2}, return_lse=True)
    return o * 2, lse


@each_case
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_captures_one_graph_and_changes_no_bit(case: CacheCase, backend: str) -> None:
    torch._dynamo.reset()
    want = steps(without_nan(case.inputs()), step)
    got = steps(without_nan(case.inputs()), torch.compile(step, fullgraph=True, backend=backend))
    assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))
    assert got[0].stride() == want[0].stride()


def test_torch_compile_with_out_growing_ints_and_more_queries() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flash_attention_with_kvcache, fullgraph=True, dynamic=True, backend="aot_eager")
    for length, seqlen_q in ((5, 2), (9, 2), (13, 7), (40, 33)):
        case = CacheCase(lengths=(40, 40), seqlen_q=seqlen_q)
        arguments, same = ({**without_nan(case.inputs()), "cache_seqlens": length} for _ in range(2))
        out = torch.full_like(arguments["q"], torch.nan)
        got = compiled(**arguments, out=out)
        assert same_bits(got, flash_attention_with_kvcache(**same)) and same_bits(got, out)
        assert same_bits(arguments["k_cache"], same["k_cache"])


def test_caches_side_by_side_in_one_tensor_compile() -> None:
    torch._dynamo.reset()
    case = CacheCase(page_size=16)

    def call(both: Tensor, arguments: dict[str, Any]) -> Tensor:
        return flash_attention_with_kvcache(**{**arguments, "k_cache": both[:, 0], "v_cache": both[:, 1]})

    both = [torch.stack((x["k_cache"], x["v_cache"]), dim=1) for x in (without_nan(case.inputs()) for _ in range(2))]
    want = call(both[0], case.inputs())
    assert same_bits(torch.compile(call, fullgraph=True, backend="aot_eager")(both[1], case.inputs()), want)
    assert same_bits(*both)


def test_what_is_written_and_only_that_counts_as_changed() -> None:
    written = {"k_cache", "v_cache", "out"}
    for case in (CacheCase(), CacheCase(append=False)):
        arguments = case.inputs() | {"out": torch.empty(3, 4, 1, 32)}
        before = {name: x._version for name, x in arguments.items() if isinstance(x, Tensor)}
        flash_attention_with_kvcache(**arguments)
        changed = {name for name, version in before.items() if arguments[name]._version != version}
        assert changed == (written if case.append else {"out"})
        for call in (explain_with_kvcache, workspace_bytes_with_kvcache):
            call(**arguments)
        assert changed == {name for name, version in before.items() if arguments[name]._version != version}


def test_inference_mode_takes_caches_of_its_own_and_others() -> None:
    case = CacheCase()
    want = flash_attention_with_kvcache(**case.inputs())
    outside = case.inputs()
    with torch.inference_mode():
        assert same_bits(flash_attention_with_kvcache(**case.inputs()), want)
        assert same_bits(flash_attention_with_kvcache(**outside), want)
        inside = case.inputs()
    with torch.no_grad():
        assert same_bits(flash_attention_with_kvcache(**inside), want)


def test_inputs_with_gradients_are_taken_where_autograd_is_off() -> None:
    arguments = CacheCase(sinks=True).inputs()
    arguments["sinks"] = torch.nn.Parameter(arguments["sinks"])
    with pytest.raises(NotImplementedError, match="no backward"):
        flash_attention_with_kvcache(**arguments)
    with torch.no_grad():
        assert not flash_attention_with_kvcache(**arguments).requires_grad


def test_subclasses_and_modes_see_the_op_and_get_the_same_bits() -> None:
    case = CacheCase(softcap=2)
    want = flash_attention_with_kvcache(**case.inputs())
    arguments = case.inputs()
    watched = flash_attention_with_kvcache(**{**arguments, "q": arguments["q"].as_subclass(Watched)})
    assert same_bits(watched.as_subclass(Tensor), want)
    assert any("with_kvcache" in str(function) for function in Watched.functions)
    with torch.device("cpu"):  # a mode
        assert same_bits(flash_attention_with_kvcache(**case.inputs()), want)


def test_autocast_leaves_the_call_as_it_is() -> None:
    case = CacheCase()
    with torch.autocast("cpu", torch.bfloat16):
        o = flash_attention_with_kvcache(**case.inputs())
    assert same_bits(o, flash_attention_with_kvcache(**case.inputs()))
