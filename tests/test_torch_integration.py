"""The functions behave as PyTorch's own under compile, export, checkpointing, autocast and any requires_grad."""

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flash_attention import FlashAttention, StandardAttention, flash_attention, flash_attention_varlen

from .cases import Case

CASES = (
    Case(seqlen_q=20, seqlen_k=30, causal=True),
    Case("bf16", bias="1h1k", alibi="bh", sinks=True, dropout_p=0.2, layout="blhd", heads_q=4, heads_kv=2),
    Case("f64", 16, 8, lengths_q=(3, 33), lengths_k=(33, 7), softcap=2.0, window=(9, 0)),
    Case("f32", packed=True, lengths_q=(3, 0, 33), lengths_k=(33, 7, 5), sinks=True),
)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script(_method)?. is deprecated")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def call_of(case: Case) -> Callable[..., tuple[Tensor, Tensor]]:
    inputs = case.inputs()
    function = flash_attention_varlen if case.packed else flash_attention
    positional, options = inputs.args[3:], {**inputs.options, **inputs.max_seqlens}

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = function(q, k, v, *positional, **options, return_lse=True)
        return o * 2, lse

    return call


class Recorder(TorchDispatchMode):
    """Remembers what the library's ops are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "flash_attention":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


@each_case
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_opcheck_passes(case: Case, name: str) -> None:
    inputs = case.inputs()
    with Recorder() as recorder:
        o, lse = call_of(case)(*inputs.args[:3])
        torch.autograd.backward((o, lse), (inputs.d_o.nan_to_num(0), inputs.d_lse.nan_to_num(0)))
    op, args = next((op, args) for op, args in recorder.calls if name in op.name())

    def leaf(x: Any) -> Any:  # without the NaN of the padding, which equals nothing
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.where(x.isnan(), 0, x.detach()).requires_grad_(name == "forward")

    torch.library.opcheck(op, tuple(map(leaf, args)))


@each_case
def test_torch_compile_captures_one_graph_and_changes_no_bit(case: Case) -> None:
    torch._dynamo.reset()
    eager = call_of(case)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    inputs = case.inputs()
    leaves = inputs.args[:3]
    gradients = (inputs.d_o, inputs.d_lse)
    expected, got = eager(*leaves), compiled(*leaves)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(got, expected, strict=True))
    assert got[0].stride() == expected[0].stride()
    for x, y in zip(
        torch.autograd.grad(got, leaves, gradients), torch.autograd.grad(expected, leaves, gradients), strict=True
    ):
        assert torch.equal(x, y)


def test_torch_compile_with_inductor_and_changing_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flash_attention, fullgraph=True, dynamic=True)
    for length in (16, 33, 50):
        q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
        assert torch.equal(compiled(q, k, v, causal=True), flash_attention(q, k, v, causal=True))


def test_torch_compile_with_changing_seeds() -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 2, 16, 16)
    compiled = torch.compile(flash_attention, fullgraph=True)
    for seed in (5, 6, -7, 2**62):
        expected = flash_attention(q, q, q, dropout_p=0.5, seed=seed)
        assert torch.equal(compiled(q, q, q, dropout_p=0.5, seed=seed), expected)


def test_torch_export_keeps_the_attention() -> None:
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    program = torch.export.export(FlashAttention(causal=True), (q, k, v))
    assert "flash_attention.forward" in program.graph_module.code
    assert torch.equal(program.module()(q, k, v), flash_attention(q, k, v, causal=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_dropout(use_reentrant: bool) -> None:
    def gradients(call: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 50, 16, requires_grad=True) for _ in range(3))
        o = call(q, k, v)
        return [o, *torch.autograd.grad(o.square().sum(), (q, k, v))] if not use_reentrant else backward(o, q, k, v)

    def backward(o: Tensor, *leaves: Tensor) -> list[Tensor]:  # reentrant checkpoints work with backward() alone
        o.square().sum().backward()
        return [o, *(x.grad for x in leaves)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, dropout_p=0.5)

    saved = gradients(attention)
    again = gradients(lambda *leaves: checkpoint(attention, *leaves, use_reentrant=use_reentrant))
    assert all(torch.equal(x, y) for x, y in zip(saved, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype):
        o = flash_attention(q, k, v, causal=True)
        standard = StandardAttention()(q, k, v, causal=True)
    assert o.dtype == dtype == standard.dtype
    assert torch.equal(o, flash_attention(q.to(dtype), k.to(dtype), v.to(dtype), causal=True))
    o.sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_is_traced_and_leaves_float64_alone() -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    bias, slopes = torch.randn(40, 40).half(), torch.rand(2)
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        o = compiled(q, k, v, bias=bias, alibi_slopes=slopes)
        assert torch.equal(o, flash_attention(q, k, v, bias=bias, alibi_slopes=slopes))
        assert flash_attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert o.dtype == torch.bfloat16
    o.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (q, k, v))


def test_no_grad_and_inference_mode_record_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            o, lse = flash_attention(q, k, v, return_lse=True)
        assert not o.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("impl", ["reference", "naive", "fused"])
def test_every_subset_of_the_inputs_gets_its_gradients(impl: str) -> None:
    case = Case(bias="1h1k", alibi="h", sinks=True, seqlen_q=9, seqlen_k=11)

    def gradients(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        inputs = case.inputs()
        for name, leaf in inputs.leaves.items():
            leaf.requires_grad_(name in wanted)
        o, lse = flash_attention(*inputs.args, **inputs.options, return_lse=True, impl=impl)
        torch.autograd.backward((o, lse), (inputs.d_o, inputs.d_lse))
        return {name: leaf.grad for name, leaf in inputs.leaves.items()}

    names = tuple(case.inputs().leaves)
    everything = gradients(names)
    for count in range(1, len(names)):
        for wanted in itertools.combinations(names, count):
            for name, gradient in gradients(wanted).items():
                assert (gradient is None) if name not in wanted else torch.equal(gradient, everything[name])


def test_a_gradient_of_one_result_alone_takes_the_other_as_zero() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    o, lse = flash_attention(q, k, v, return_lse=True)
    both = (o, torch.ones_like(o)), (lse, torch.ones_like(lse))
    for n, (result, gradient) in enumerate(both):
        zeros = [g if i == n else torch.zeros_like(g) for i, (_, g) in enumerate(both)]
        expected = torch.autograd.grad((o, lse), (q, k, v), zeros, retain_graph=True)
        got = torch.autograd.grad(result, (q, k, v), gradient, retain_graph=True, materialize_grads=True)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_a_gradient_in_any_strides_is_taken() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    expanded = torch.autograd.grad(flash_attention(q, k, v).sum(), (q, k, v))
    whole = torch.autograd.grad(flash_attention(q, k, v), (q, k, v), torch.ones(1, 2, 9, 8))
    assert all(torch.equal(x, y) for x, y in zip(expanded, whole, strict=True))


def test_what_is_saved_may_not_change_before_the_backward() -> None:
    leaves = [torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3)]
    for changed in range(4):
        tensors = [x * 1 for x in leaves]
        tensors.append(flash_attention(*tensors))
        tensors[changed].detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            tensors[3].sum().backward()


def test_saved_tensor_hooks_hold_the_inputs() -> None:
    q, k, v = (torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(flash_attention(q, k, v).sum(), (q, k, v))
    packed: list[Tensor] = []

    def pack(x: Tensor) -> int:
        packed.append(x.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, packed.__getitem__):
        o = flash_attention(q, k, v)
    assert sum(torch.equal(x, y) for x in packed for y in (q, k, v)) == 3
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(o.sum(), (q, k, v)), expected, strict=True))


def test_a_graph_that_is_used_up_says_so() -> None:
    q = torch.randn(1, 1, 5, 4, requires_grad=True)
    o = flash_attention(q, q, q)
    o.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        o.sum().backward()


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    q, k, v = (torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3))
    (d_q,) = torch.autograd.grad(flash_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(d_q.sum(), q)


def test_a_forward_mode_derivative_is_refused_rather_than_zero() -> None:
    q, k, v = (torch.randn(1, 1, 5, 4) for _ in range(3))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: flash_attention(q, k, v), (q,), (q,))


class Watched(Tensor):
    """A subclass that sees every function called with it."""

    functions: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.functions.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_and_modes_see_the_op_and_get_the_same_bits() -> None:
    q, k, v = (torch.randn(1, 1, 5, 4) for _ in range(3))
    expected = flash_attention(q, k, v, softcap=2)
    assert torch.equal(flash_attention(nn.Parameter(q), k, v, softcap=2.0), expected)
    watched = flash_attention(q.as_subclass(Watched), k, v, softcap=2)
    assert isinstance(watched, Watched) and torch.equal(watched.as_subclass(Tensor), expected)
    assert any("flash_attention" in str(function) for function in Watched.functions)
    with torch.device("cpu"):  # a mode
        assert torch.equal(flash_attention(q, k, v, softcap=2), expected)
    with Recorder() as recorder:
        flash_attention(q, k, v)
    assert [str(op) for op, _ in recorder.calls] == ["flash_attention.forward.default"]


def test_modules_take_defaults_that_a_call_overrides_and_drop_only_in_training() -> None:
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    for module in (FlashAttention(causal=True, dropout_p=0.5), StandardAttention(causal=True, dropout_p=0.5)):
        assert isinstance(module, nn.Module) and not list(module.parameters())
        module.eval()
        torch.testing.assert_close(module(q, k, v), flash_attention(q, k, v, causal=True))
        torch.testing.assert_close(module(q, k, v, causal=False), flash_attention(q, k, v))
        module.train()
        expected = flash_attention(q, k, v, causal=True, dropout_p=0.5, seed=1)
        torch.testing.assert_close(module(q, k, v, seed=1), expected)
        assert "causal=True" in repr(module)
