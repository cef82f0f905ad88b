// What the ops are called with, as the C core takes it: tensors in, fa_forward_args out, a status back as a Python exception.
//
// The ops are boxed kernels: each reads its arguments from the stack in the order of its schema, so the list of arguments
// stands once, in FA_REQUEST, and is parsed once, in Request.
#ifndef FA_BINDINGS_REQUEST_H
#define FA_BINDINGS_REQUEST_H

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "flash_attention.h"

namespace fa {

using at::Tensor;
using torch::jit::Stack;

#define FA_REQUEST                                                                                                     \
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seqlens_q, "             \
    "Tensor? seqlens_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, SymInt max_seqlen_q, "               \
    "SymInt max_seqlen_k, float? softmax_scale, bool causal, SymInt window_left, SymInt window_right, "                \
    "float softcap, float dropout_p, bool deterministic, str impl"
// Of each: a tensor, an int, a float, a bool, a string; in capitals where it may be None.
#define FA_REQUEST_KINDS "tttTTTTTTTTiiFbiiffbs"
enum { kRequestSize = sizeof FA_REQUEST_KINDS - 1 };
enum {
    kTensors = 11,
    kDifferentiable = 6
}; // the first arguments are tensors, and the first of these may have gradients

inline void check(fa_status status) {
    if (status == FA_OK) return;
    TORCH_CHECK_TYPE(status != FA_ERROR_TYPE, fa_error_text());
    TORCH_CHECK_VALUE(status == FA_ERROR_DEVICE || status == FA_ERROR_WORKSPACE, fa_error_text());
    TORCH_CHECK(false, fa_error_text());
}

inline fa_dtype dtype_of(const char *name, const Tensor &t) {
    switch (t.scalar_type()) {
    case at::kFloat: return FA_FLOAT32;
    case at::kDouble: return FA_FLOAT64;
    case at::kHalf: return FA_FLOAT16;
    case at::kBFloat16: return FA_BFLOAT16;
    default: TORCH_CHECK_TYPE(false, name, " is ", t.scalar_type(), ": must be float32, float64, float16 or bfloat16");
    }
}

// "[2, 3]". Not by way of a stream: where a compiler links libstdc++ statically, a number's way through its locales may
// end in torch's.
inline std::string text(at::IntArrayRef numbers) {
    std::string all;
    for (const int64_t number : numbers) all += (all.empty() ? "" : ", ") + std::to_string(number);
    return '[' + all + ']';
}

inline void check_shape(const char *name, const Tensor &t, const char *shape, at::IntArrayRef expected) {
    TORCH_CHECK_VALUE(t.sizes() == expected, name, " has shape ", text(t.sizes()), ": must be ", shape, " = ",
                      text(expected));
}

// (B, H, L, D), or (T, H, D) where sequences are packed.
inline fa_tensor tensor_of(const char *name, const Tensor &t, bool packed) {
    TORCH_CHECK_VALUE(t.dim() == (packed ? 3 : 4), name, " has shape ", text(t.sizes()), ": must be ",
                      packed ? "(tokens, heads, head_dim)" : "(batch, heads, length, head_dim)");
    TORCH_CHECK_VALUE(t.stride(-1) == 1 || t.size(-1) <= 1, name, " has strides ", text(t.strides()),
                      ": the last axis must be contiguous; call .contiguous()");
    return packed ? fa_tensor{t.data_ptr(), 0, t.stride(1), t.stride(0)}
                  : fa_tensor{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline fa_tensor lse_tensor(const Tensor &t, bool packed) { // (B, Hq, Lq) or (Hq, Tq)
    return packed ? fa_tensor{t.data_ptr(), 0, t.stride(0), t.stride(1)}
                  : fa_tensor{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline fa_bias bias_of(const char *name, const Tensor &t, at::IntArrayRef full) {
    fa_bias bias{t.data_ptr(), dtype_of(name, t), 0, 0, 0, 0};
    int64_t *strides[4] = {&bias.stride_b, &bias.stride_h, &bias.stride_q, &bias.stride_k};
    TORCH_CHECK_VALUE(t.dim() <= 4, name, " has shape ", text(t.sizes()),
                      ": must broadcast to (B, Hq, Lq, Lk) = ", text(full));
    for (int64_t axis = 4 - t.dim(), i = 0; axis < 4; ++axis, ++i) {
        TORCH_CHECK_VALUE(t.size(i) == 1 || t.size(i) == full[axis], name, " has shape ", text(t.sizes()),
                          ": must broadcast to (B, Hq, Lq, Lk) = ", text(full));
        *strides[axis] = t.size(i) == 1 ? 0 : t.stride(i);
    }
    static char nothing; // an empty tensor has no storage, and NULL would mean: no bias
    if (!bias.data) bias.data = &nothing;
    return bias;
}

inline fa_per_head per_head_of(const char *name, const Tensor &t, int64_t batch, int64_t heads, bool with_batch) {
    const bool two_axes = with_batch && t.dim() == 2;
    TORCH_CHECK_VALUE(two_axes ? t.size(0) == batch && t.size(1) == heads : t.dim() == 1 && t.size(0) == heads, name,
                      " has shape ", text(t.sizes()), ": must be (Hq,) = ", text(heads),
                      with_batch ? " or (B, Hq)" : "");
    static char nothing; // as in bias_of
    return {t.data_ptr() ? t.data_ptr() : &nothing, dtype_of(name, t), two_axes ? t.stride(0) : 0, t.stride(-1)};
}

inline const int32_t *lengths_of(const char *name, const std::optional<Tensor> &t, int64_t count) {
    if (!t) return nullptr;
    TORCH_CHECK_TYPE(t->scalar_type() == at::kInt, name, " is ", t->scalar_type(), ": must be int32");
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == count && t->is_contiguous(), name, " has shape ", text(t->sizes()),
                      ": must be a contiguous (", std::to_string(count), ",)");
    static const int32_t nothing = 0;
    return t->numel() ? t->const_data_ptr<int32_t>() : &nothing;
}

inline void run_on_torch_threads(void *context, void (*body)(void *arg, int32_t worker), void *arg) {
    const int64_t count = reinterpret_cast<intptr_t>(context);
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
        for (int64_t worker = first; worker < last; ++worker) body(arg, static_cast<int32_t>(worker));
    });
}

inline bool has_cuda_kernels() {
    fa_kernel_info info{};
    for (int32_t index = 0; index < fa_kernel_count() && info.device != FA_CUDA; ++index)
        check(fa_kernel_describe(index, &info));
    return info.device == FA_CUDA;
}

// torch's own threads; one where waking them would cost more than the work (results do not depend on the count).
inline fa_workers torch_workers(const fa_forward_args &args) {
    const double multiplications = static_cast<double>(args.batch * args.heads_q) * static_cast<double>(args.seqlen_q) *
                                   static_cast<double>(args.seqlen_k) *
                                   static_cast<double>(args.head_dim + args.head_dim_v);
    const int64_t count = multiplications < 1e6 || at::in_parallel_region() ? 1 : at::get_num_threads();
    return {static_cast<int32_t>(count), run_on_torch_threads, reinterpret_cast<void *>(static_cast<intptr_t>(count))};
}

// The arguments of FA_REQUEST, from stack position `first` on. While it lives, q's GPU is the current one.
struct Request {
    Tensor q, k, v;
    std::optional<Tensor> bias, alibi_slopes, sinks, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k, seed;
    bool packed, deterministic;
    fa_forward_args args{};
    c10::OptionalDeviceGuard device_guard;

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
        if (args.device == FA_CPU)
            args.workers = torch_workers(args);
        else
            enter_device();
    }

    // The current stream comes from the device's virtual guard, which needs neither CUDA headers nor libtorch_cuda.
    void enter_device() {
        static const bool served = has_cuda_kernels();
        TORCH_CHECK_VALUE(served, "q is on ", q.device(),
                          " and this build has kernels for the CPU alone: build it with ",
                          "FA_CUDA=1, which needs nvcc");
        device_guard.reset_device(q.device());
        args.stream = c10::impl::VirtualGuardImpl(q.device().type()).getStream(q.device()).native_handle();
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
            TORCH_CHECK_VALUE(seed->numel() == 1, "seed has shape ", text(seed->sizes()), ": must have one element");
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

    // With FLASH_ATTENTION_CHECK=1, lengths on a GPU are copied to the host and held to what the CPU allows.
    void check_lengths() const {
        const char *wanted = std::getenv("FLASH_ATTENTION_CHECK");
        if (args.device == FA_CPU || !wanted || std::string_view(wanted) != "1") return;
        std::vector<Tensor> copies;
        const auto on_host = [&](const std::optional<Tensor> &t) -> const int32_t * {
            return t ? copies.emplace_back(t->cpu()).const_data_ptr<int32_t>() : nullptr;
        };
        fa_forward_args on_cpu = args;
        on_cpu.seqlens_q = on_host(seqlens_q), on_cpu.seqlens_k = on_host(seqlens_k);
        on_cpu.cu_seqlens_q = on_host(cu_seqlens_q), on_cpu.cu_seqlens_k = on_host(cu_seqlens_k);
        check(fa_check_lengths(&on_cpu));
    }

    size_t forward_bytes() const {
        size_t bytes = 0;
        check(fa_forward_workspace_bytes(&args, &bytes));
        return bytes;
    }
};

} // namespace fa

#endif
