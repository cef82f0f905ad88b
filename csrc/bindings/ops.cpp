// The ops that compute: what the dispatcher calls for tensors of a CPU or a GPU.
#include "bindings/request.h"

namespace fa {
namespace {

size_t backward_bytes(const fa_backward_args &args) {
    size_t bytes = 0;
    check(fa_backward_workspace_bytes(&args, &bytes));
    return bytes;
}

void forward_op(const c10::OperatorHandle &, Stack *stack) {
    Request request(*stack, stack->size() - kRequestSize);
    const size_t bytes = request.forward_bytes(); // refuses a bad request before anything is allocated
    request.check_lengths();
    Tensor o = empty_in_layout_of(request.q, request.args.head_dim_v), lse = request.empty_lse();
    request.args.o = tensor_of("o", o, request.packed), request.args.lse = lse_tensor(lse, request.packed);
    const Tensor memory = request.workspace(bytes);
    check(fa_forward(&request.args));
    torch::jit::drop(*stack, kRequestSize);
    torch::jit::push(*stack, std::move(o), std::move(lse));
}

enum { kBackwardSize = 4 + kRequestSize + 1 }; // d_o, d_lse, o, lse; the request; which gradients are wanted

void backward_op(const c10::OperatorHandle &, Stack *stack) {
    const size_t first = stack->size() - kBackwardSize;
    Request request(*stack, first + 4);
    const bool packed = request.packed;
    const Tensor d_o = (*stack)[first].toTensor(), o = (*stack)[first + 2].toTensor(),
                 lse = (*stack)[first + 3].toTensor();
    const std::optional<Tensor> d_lse = (*stack)[first + 1].toOptional<Tensor>();
    const auto wanted = stack->back().toBoolList(); // bias, alibi_slopes, sinks
    const Tensor d_o_rows = d_o.stride(-1) == 1 || d_o.size(-1) <= 1 ? d_o : d_o.contiguous(); // an expanded gradient
    fa_forward_args &args = request.args;
    const auto check_like = [&](const char *name, const Tensor &t, at::IntArrayRef sizes, at::ScalarType dtype) {
        check_shape(name, t, "what forward made", sizes);
        TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " is ", t.scalar_type(), ": must be ", dtype);
        request.same_device(name, t);
    };
    std::vector<int64_t> o_sizes = request.q.sizes().vec();
    o_sizes.back() = args.head_dim_v;
    check_like("o", o, o_sizes, request.q.scalar_type());
    check_like("d_o", d_o, o_sizes, request.q.scalar_type());
    check_like("lse", lse, request.lse_sizes(), request.lse_dtype());
    if (d_lse) check_like("d_lse", *d_lse, request.lse_sizes(), request.lse_dtype());
    args.o = tensor_of("o", o, packed), args.lse = lse_tensor(lse, packed);

    fa_backward_args backward{};
    const auto gradient_of = [&](const std::optional<Tensor> &t, bool want) {
        return want && t ? at::empty(t->sizes(), t->options()) : at::empty({0}, request.q.options());
    };
    Tensor d_q = empty_in_layout_of(request.q, args.head_dim);
    Tensor d_k = empty_in_layout_of(request.k, args.head_dim);
    Tensor d_v = empty_in_layout_of(request.v, args.head_dim_v);
    Tensor d_bias = gradient_of(request.bias, wanted[0]), d_slopes = gradient_of(request.alibi_slopes, wanted[1]);
    Tensor d_sinks = gradient_of(request.sinks, wanted[2]);
    backward.d_o = tensor_of("d_o", d_o_rows, packed), backward.d_q = tensor_of("d_q", d_q, packed);
    backward.d_k = tensor_of("d_k", d_k, packed), backward.d_v = tensor_of("d_v", d_v, packed);
    if (d_lse) backward.d_lse = lse_tensor(*d_lse, packed);
    if (request.bias && wanted[0])
        backward.d_bias = bias_of("d_bias", d_bias, {args.batch, args.heads_q, args.seqlen_q, args.seqlen_k});
    if (request.alibi_slopes && wanted[1])
        backward.d_alibi_slopes = per_head_of("d_alibi_slopes", d_slopes, args.batch, args.heads_q, true);
    if (request.sinks && wanted[2]) backward.d_sinks = per_head_of("d_sinks", d_sinks, args.batch, args.heads_q, false);
    backward.deterministic = request.deterministic;
    backward.forward = args;
    const Tensor memory = request.workspace(backward_bytes(backward));
    request.check_lengths();
    backward.forward.workspace = args.workspace, backward.forward.workspace_bytes = args.workspace_bytes;
    check(fa_backward(&backward));
    torch::jit::drop(*stack, kBackwardSize);
    torch::jit::push(*stack, std::move(d_q), std::move(d_k), std::move(d_v), std::move(d_bias), std::move(d_slopes),
                     std::move(d_sinks));
}

void workspace_bytes_op(const c10::OperatorHandle &, Stack *stack) {
    const Request request(*stack, stack->size() - kRequestSize - 1);
    fa_backward_args backward{};
    backward.forward = request.args;
    const size_t bytes = stack->back().toBool() ? backward_bytes(backward) : request.forward_bytes();
    torch::jit::drop(*stack, kRequestSize + 1);
    torch::jit::push(*stack, static_cast<int64_t>(bytes));
}

void explain_op(const c10::OperatorHandle &, Stack *stack) {
    const Request request(*stack, stack->size() - kRequestSize - 1);
    const fa_pass pass = stack->back().toBool() ? FA_BACKWARD : FA_FORWARD;
    auto rows = verdicts([&](int32_t index, char *verdict, size_t size) {
        return fa_kernel_verdict(index, &request.args, pass, verdict, size);
    });
    torch::jit::drop(*stack, kRequestSize + 1);
    torch::jit::push(*stack, std::move(rows));
}

TORCH_LIBRARY(flash_attention, library) {
    library.def("forward(" FA_REQUEST ") -> (Tensor o, Tensor lse)");
    library.def("backward(Tensor d_o, Tensor? d_lse, Tensor o, Tensor lse, " FA_REQUEST ", bool[3] wanted) -> "
                "(Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_bias, Tensor d_alibi_slopes, Tensor d_sinks)");
    library.def("workspace_bytes(" FA_REQUEST ", bool backward) -> int");
    library.def("explain(" FA_REQUEST ", bool backward) -> str[]");
}

void register_kernels(torch::Library &library) {
    library.impl("forward", torch::CppFunction::makeFromBoxedFunction<forward_op>());
    library.impl("backward", torch::CppFunction::makeFromBoxedFunction<backward_op>());
    library.impl("workspace_bytes", torch::CppFunction::makeFromBoxedFunction<workspace_bytes_op>());
    library.impl("explain", torch::CppFunction::makeFromBoxedFunction<explain_op>());
}
TORCH_LIBRARY_IMPL(flash_attention, CPU, library) { register_kernels(library); }
TORCH_LIBRARY_IMPL(flash_attention, CUDA, library) { register_kernels(library); }

} // namespace
} // namespace fa
