// The only file that sees torch: tensors in, fa_forward_args out, a status back as a Python exception.
//
// The ops are boxed kernels: each reads its arguments from the stack in the order of its schema, so the list of arguments
// stands once, in FA_REQUEST, and is parsed once, in Request.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "flash_attention.h"

namespace {

using at::Tensor;
using torch::jit::Stack;

#define FA_REQUEST                                                                                                     \
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seqlens_q, "             \
    "Tensor? seqlens_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, SymInt max_seqlen_q, "               \
    "SymInt max_seqlen_k, float? softmax_scale, bool causal, SymInt window_left, SymInt window_right, "                \
    "float softcap, float dropout_p, bool deterministic, str impl"
enum { kRequestSize = 21 };

void check(fa_status status) {
    if (status == FA_OK) return;
    TORCH_CHECK_TYPE(status != FA_ERROR_TYPE, fa_error_text());
    TORCH_CHECK_VALUE(status == FA_ERROR_DEVICE || status == FA_ERROR_WORKSPACE, fa_error_text());
    TORCH_CHECK(false, fa_error_text());
}

fa_dtype dtype_of(const char *name, const Tensor &t) {
    switch (t.scalar_type()) {
    case at::kFloat: return FA_FLOAT32;
    case at::kDouble: return FA_FLOAT64;
    case at::kHalf: return FA_FLOAT16;
    case at::kBFloat16: return FA_BFLOAT16;
    default: TORCH_CHECK_TYPE(false, name, " is ", t.scalar_type(), ": must be float32, float64, float16 or bfloat16");
    }
}

void check_shape(const char *name, const Tensor &t, const char *shape, at::IntArrayRef expected) {
    TORCH_CHECK_VALUE(t.sizes() == expected, name, " has shape ", t.sizes(), ": must be ", shape, " = ", expected);
}

// (B, H, L, D), or (T, H, D) where sequences are packed.
fa_tensor tensor_of(const char *name, const Tensor &t, bool packed) {
    TORCH_CHECK_VALUE(t.dim() == (packed ? 3 : 4), name, " has shape ", t.sizes(), ": must be ",
                      packed ? "(tokens, heads, head_dim)" : "(batch, heads, length, head_dim)");
    TORCH_CHECK_VALUE(t.stride(-1) == 1 || t.size(-1) <= 1, name, " has strides ", t.strides(),
                      ": the last axis must be contiguous; call .contiguous()");
    return packed ? fa_tensor{t.data_ptr(), 0, t.stride(1), t.stride(0)}
                  : fa_tensor{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

fa_tensor lse_tensor(const Tensor &t, bool packed) { // (B, Hq, Lq) or (Hq, Tq)
    return packed ? fa_tensor{t.data_ptr(), 0, t.stride(0), t.stride(1)}
                  : fa_tensor{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

fa_bias bias_of(const char *name, const Tensor &t, at::IntArrayRef full) {
    fa_bias bias{t.data_ptr(), dtype_of(name, t), 0, 0, 0, 0};
    int64_t *strides[4] = {&bias.stride_b, &bias.stride_h, &bias.stride_q, &bias.stride_k};
    TORCH_CHECK_VALUE(t.dim() <= 4, name, " has shape ", t.sizes(), ": must broadcast to (B, Hq, Lq, Lk) = ", full);
    for (int64_t axis = 4 - t.dim(), i = 0; axis < 4; ++axis, ++i) {
        TORCH_CHECK_VALUE(t.size(i) == 1 || t.size(i) == full[axis], name, " has shape ", t.sizes(),
                          ": must broadcast to (B, Hq, Lq, Lk) = ", full);
        *strides[axis] = t.size(i) == 1 ? 0 : t.stride(i);
    }
    static char nothing; // an empty tensor has no storage, and NULL would mean: no bias
    if (!bias.data) bias.data = &nothing;
    return bias;
}

fa_per_head per_head_of(const char *name, const Tensor &t, int64_t batch, int64_t heads, bool with_batch) {
    const bool two_axes = with_batch && t.dim() == 2;
    TORCH_CHECK_VALUE(two_axes ? t.size(0) == batch && t.size(1) == heads : t.dim() == 1 && t.size(0) == heads, name,
                      " has shape ", t.sizes(), ": must be (Hq,) = [", heads, "]", with_batch ? " or (B, Hq)" : "");
    static char nothing; // as in bias_of
    return {t.data_ptr() ? t.data_ptr() : &nothing, dtype_of(name, t), two_axes ? t.stride(0) : 0, t.stride(-1)};
}

const int32_t *lengths_of(const char *name, const std::optional<Tensor> &t, int64_t count) {
    if (!t) return nullptr;
    TORCH_CHECK_TYPE(t->scalar_type() == at::kInt, name, " is ", t->scalar_type(), ": must be int32");
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == count && t->is_contiguous(), name, " has shape ", t->sizes(),
                      ": must be a contiguous (", count, ",)");
    static const int32_t nothing = 0;
    return t->numel() ? t->const_data_ptr<int32_t>() : &nothing;
}

void run_on_torch_threads(void *context, void (*body)(void *arg, int32_t worker), void *arg) {
    const int64_t count = reinterpret_cast<intptr_t>(context);
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
        for (int64_t worker = first; worker < last; ++worker) body(arg, static_cast<int32_t>(worker));
    });
}

// torch's own threads; one where waking them would cost more than the work (results do not depend on the count).
fa_workers torch_workers(const fa_forward_args &args) {
    const double multiplications = static_cast<double>(args.batch * args.heads_q) * static_cast<double>(args.seqlen_q) *
                                   static_cast<double>(args.seqlen_k) *
                                   static_cast<double>(args.head_dim + args.head_dim_v);
    const int64_t count = multiplications < 1e6 || at::in_parallel_region() ? 1 : at::get_num_threads();
    return {static_cast<int32_t>(count), run_on_torch_threads, reinterpret_cast<void *>(static_cast<intptr_t>(count))};
}

// The arguments of FA_REQUEST, from stack position `first` on.
struct Request {
    Tensor q, k, v;
    std::optional<Tensor> bias, alibi_slopes, sinks, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k, seed;
    bool packed, deterministic;
    fa_forward_args args{};

    Request(const Stack &stack, size_t first) {
        const auto tensor = [&](size_t i) { return stack[first + i].toOptional<Tensor>(); };
        const auto value = [&](size_t i) -> const c10::IValue & { return stack[first + i]; };
        q = value(0).toTensor(), k = value(1).toTensor(), v = value(2).toTensor();
        bias = tensor(3), alibi_slopes = tensor(4), sinks = tensor(5), seqlens_q = tensor(6), seqlens_k = tensor(7);
        cu_seqlens_q = tensor(8), cu_seqlens_k = tensor(9), seed = tensor(10);
        packed = cu_seqlens_q.has_value() || cu_seqlens_k.has_value();
        args.causal = value(14).toBool(), args.window_left = value(15).toInt(), args.window_right = value(16).toInt();
        args.softcap = value(17).toDouble(), args.dropout_p = value(18).toDouble(), deterministic = value(19).toBool();
        check(fa_impl_parse(value(20).toStringRef().c_str(), &args.impl));
        read_inputs(value(11).toInt(), value(12).toInt());
        args.softmax_scale =
            value(13).isNone() ? 1 / std::sqrt(static_cast<double>(args.head_dim)) : value(13).toDouble();
        read_companions();
        args.workers = torch_workers(args);
    }

    void read_inputs(int64_t max_seqlen_q, int64_t max_seqlen_k) {
        args.device = q.is_cuda() ? FA_CUDA : FA_CPU;
        args.dtype = dtype_of("q", q);
        for (const auto &[name, t] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
            TORCH_CHECK_TYPE(t->scalar_type() == q.scalar_type(), name, " is ", t->scalar_type(), " and q is ",
                             q.scalar_type(), ": q, k and v must have one dtype");
            same_device(name, *t);
        }
        args.q = tensor_of("q", q, packed), args.k = tensor_of("k", k, packed), args.v = tensor_of("v", v, packed);
        const int64_t tokens = packed ? 0 : 2, heads = 1; // their axes
        args.heads_q = q.size(heads), args.heads_kv = k.size(heads);
        args.head_dim = q.size(-1), args.head_dim_v = v.size(-1);
        if (packed) {
            args.batch = (cu_seqlens_q ? cu_seqlens_q : cu_seqlens_k)->numel() - 1;
            TORCH_CHECK_VALUE(args.batch >= 0, "cu_seqlens_q has no element: must be (B + 1,)");
            args.seqlen_q = max_seqlen_q, args.seqlen_k = max_seqlen_k;
            args.total_q = q.size(0), args.total_k = k.size(0);
            check_shape("k", k, "(Tk, Hkv, D)", {k.size(0), k.size(1), args.head_dim});
            check_shape("v", v, "(Tk, Hkv, Dv)", {k.size(0), k.size(1), v.size(2)});
        } else {
            args.batch = q.size(0), args.seqlen_q = q.size(tokens), args.seqlen_k = k.size(tokens);
            check_shape("k", k, "(B, Hkv, Lk, D)", {args.batch, k.size(1), k.size(2), args.head_dim});
            check_shape("v", v, "(B, Hkv, Lk, Dv)", {args.batch, k.size(1), k.size(2), v.size(3)});
        }
    }

    void read_companions() {
        for (const auto &[name, t] : {std::pair{"bias", &bias}, std::pair{"alibi_slopes", &alibi_slopes},
                                      std::pair{"sinks", &sinks}, std::pair{"seqlens_q", &seqlens_q},
                                      std::pair{"seqlens_k", &seqlens_k}, std::pair{"cu_seqlens_q", &cu_seqlens_q},
                                      std::pair{"cu_seqlens_k", &cu_seqlens_k}, std::pair{"seed", &seed}})
            if (*t) same_device(name, **t);
        if (bias) args.bias = bias_of("bias", *bias, {args.batch, args.heads_q, args.seqlen_q, args.seqlen_k});
        if (alibi_slopes)
            args.alibi_slopes = per_head_of("alibi_slopes", *alibi_slopes, args.batch, args.heads_q, true);
        if (sinks) args.sinks = per_head_of("sinks", *sinks, args.batch, args.heads_q, false);
        args.seqlens_q = lengths_of("seqlens_q", seqlens_q, args.batch);
        args.seqlens_k = lengths_of("seqlens_k", seqlens_k, args.batch);
        args.cu_seqlens_q = lengths_of("cu_seqlens_q", cu_seqlens_q, args.batch + 1);
        args.cu_seqlens_k = lengths_of("cu_seqlens_k", cu_seqlens_k, args.batch + 1);
        if (seed && args.dropout_p != 0) {
            TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong, "seed is ", seed->scalar_type(), ": must be int64");
            TORCH_CHECK_VALUE(seed->numel() == 1, "seed has shape ", seed->sizes(), ": must have one element");
            args.dropout_seed = seed->const_data_ptr<int64_t>();
        }
    }

    void same_device(const char *name, const Tensor &t) const {
        TORCH_CHECK_VALUE(t.device() == q.device(), name, " is on ", t.device(), " and q is on ", q.device(),
                          ": all tensors must be on one device");
    }

    // A tensor of like's sizes but for the last axis, in like's order of the head and length axes.
    Tensor empty_in_layout_of(const Tensor &like, int64_t width) const {
        std::vector<int64_t> sizes = like.sizes().vec();
        sizes.back() = width;
        if (packed || like.stride(1) >= like.stride(2)) return at::empty(sizes, like.options());
        std::swap(sizes[1], sizes[2]);
        return at::empty(sizes, like.options()).transpose(1, 2);
    }

    std::vector<int64_t> lse_sizes() const {
        std::vector<int64_t> sizes = q.sizes().vec();
        sizes.pop_back();
        if (packed) std::swap(sizes[0], sizes[1]);
        return sizes;
    }

    at::ScalarType lse_dtype() const { return args.dtype == FA_FLOAT64 ? at::kDouble : at::kFloat; }

    Tensor empty_lse() const { return at::empty(lse_sizes(), q.options().dtype(lse_dtype())); }

    Tensor workspace(size_t bytes) {
        Tensor memory = at::empty({static_cast<int64_t>(bytes)}, q.options().dtype(at::kByte));
        args.workspace = memory.data_ptr(), args.workspace_bytes = bytes;
        return memory;
    }

    size_t forward_bytes() const {
        size_t bytes = 0;
        check(fa_forward_workspace_bytes(&args, &bytes));
        return bytes;
    }
};

size_t backward_bytes(const fa_backward_args &args) {
    size_t bytes = 0;
    check(fa_backward_workspace_bytes(&args, &bytes));
    return bytes;
}

void forward_op(const c10::OperatorHandle &, Stack *stack) {
    Request request(*stack, stack->size() - kRequestSize);
    const size_t bytes = request.forward_bytes(); // refuses a bad request before anything is allocated
    Tensor o = request.empty_in_layout_of(request.q, request.args.head_dim_v), lse = request.empty_lse();
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
    Tensor d_q = request.empty_in_layout_of(request.q, args.head_dim);
    Tensor d_k = request.empty_in_layout_of(request.k, args.head_dim);
    Tensor d_v = request.empty_in_layout_of(request.v, args.head_dim_v);
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

// "impl", "device", "verdict" of each kernel, one after the other.
void explain_op(const c10::OperatorHandle &, Stack *stack) {
    const Request request(*stack, stack->size() - kRequestSize - 1);
    const fa_pass pass = stack->back().toBool() ? FA_BACKWARD : FA_FORWARD;
    c10::List<std::string> rows;
    for (int32_t index = 0; index < fa_kernel_count(); ++index) {
        fa_kernel_info info;
        char verdict[512];
        check(fa_kernel_describe(index, &info));
        check(fa_kernel_verdict(index, &request.args, pass, verdict, sizeof verdict));
        rows.push_back(info.name);
        rows.push_back(info.device == FA_CUDA ? "cuda" : "cpu");
        rows.push_back(verdict);
    }
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

PYBIND11_MODULE(_C, module) {
    module.doc() = "The C core of flash_attention; its ops are torch.ops.flash_attention.*";
    module.attr("version") = FA_VERSION;
    module.def(
        "cpu_isa",
        [] {
            const char *isa = fa_cpu_isa();
            if (!isa) throw pybind11::value_error(fa_error_text());
            return std::string(isa);
        },
        "The CPU instruction set in use. Raises ValueError where FLASH_ATTENTION_ISA names none that this machine has.");
    module.def(
        "kernels",
        [] {
            std::vector<std::pair<std::string, std::string>> rows;
            for (int32_t index = 0; index < fa_kernel_count(); ++index) {
                fa_kernel_info info;
                check(fa_kernel_describe(index, &info));
                rows.emplace_back(info.name, info.device == FA_CUDA ? "cuda" : "cpu");
            }
            return rows;
        },
        "(impl, device) of every kernel of this build, fastest first.");
}
