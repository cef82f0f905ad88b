// What the ops are called with, as the C core takes it: tensors in, fa_forward_args out, a status back as a Python exception.
//
// The ops are boxed kernels: each reads its arguments from the stack in the order of its schema, so the list of arguments
// stands once, in FA_REQUEST, and is parsed once, in Request.
#ifndef FA_BINDINGS_REQUEST_H
#define FA_BINDINGS_REQUEST_H

#include "bindings/tensors.h"

namespace fa {

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
            args.workers = torch_workers(static_cast<double>(args.batch * args.heads_q) *
                                         static_cast<double>(args.seqlen_q) * static_cast<double>(args.seqlen_k) *
                                         static_cast<double>(args.head_dim + args.head_dim_v));
        else
            args.stream = enter_device(q, device_guard);
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
        if (seqlens_q) args.seqlens_q = lengths_of("seqlens_q", *seqlens_q, args.batch);
        if (seqlens_k) args.seqlens_k = lengths_of("seqlens_k", *seqlens_k, args.batch);
        if (cu_seqlens_q) args.cu_seqlens_q = lengths_of("cu_seqlens_q", *cu_seqlens_q, args.batch + 1);
        if (cu_seqlens_k) args.cu_seqlens_k = lengths_of("cu_seqlens_k", *cu_seqlens_k, args.batch + 1);
        if (seed && args.dropout_p != 0) {
            TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong, "seed is ", seed->scalar_type(), ": must be int64");
            TORCH_CHECK_VALUE(seed->numel() == 1, "seed has shape ", text(seed->sizes()), ": must have one element");
            args.dropout_seed = seed->const_data_ptr<int64_t>();
        }
    }

    void same_device(const char *name, const Tensor &t) const { check_same_device(name, t, q); }

    std::vector<int64_t> lse_sizes() const {
        std::vector<int64_t> sizes = q.sizes().vec();
        sizes.pop_back();
        if (packed) std::swap(sizes[0], sizes[1]);
        return sizes;
    }

    at::ScalarType lse_dtype() const { return args.dtype == FA_FLOAT64 ? at::kDouble : at::kFloat; }

    Tensor empty_lse() const { return at::empty(lse_sizes(), q.options().dtype(lse_dtype())); }

    Tensor workspace(size_t bytes) {
        Tensor memory = empty_bytes(bytes, q);
        args.workspace = memory.data_ptr(), args.workspace_bytes = bytes;
        return memory;
    }

    void check_lengths() const {
        if (!lengths_are_checked(args.device)) return;
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
