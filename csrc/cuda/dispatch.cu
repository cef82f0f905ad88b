// CUDA's rows of the kernel table.
#include "cuda/cuda.h"

static void refuse_split(const fa_forward_args *args, const fa_backward_args *, fa_reasons *reasons) {
    if (args->dtype == FA_FLOAT64) fa_add_reason(reasons, "takes float32, float16 and bfloat16, not float64");
}

// Whether rows are made of whole 16 bytes, aligned. width: elements; heads, batches: 1 where the stride is not used.
static bool has_vectors(const fa_forward_args *args, const fa_tensor &t, int64_t width, int64_t heads) {
    const int64_t batches = args->cu_seqlens_q ? 1 : args->batch;
    const int64_t steps = t.stride_l | width | (heads > 1 ? t.stride_h : 0) | (batches > 1 ? t.stride_b : 0);
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && steps * fa_dtype_bytes(args->dtype) % 16 == 0;
}

static void refuse_tensor_core(const fa_forward_args *args, const fa_backward_args *backward, fa_reasons *reasons) {
    if (args->dtype == FA_FLOAT64) fa_add_reason(reasons, "takes float32, float16 and bfloat16, not float64");
    if (args->dtype == FA_FLOAT32 && args->impl == FA_AUTO)
        fa_add_reason(reasons, "takes float32 by name alone: scores of hundreds lose bits that fused keeps");
    const int max_dim = args->dtype == FA_FLOAT32 ? kMaxTensorCoreDimF32 : kMaxTensorCoreDim;
    if (fa_max(args->head_dim, args->head_dim_v) > max_dim)
        fa_add_reason(reasons, "takes head_dim up to %d in %s, not %lld", max_dim, fa_dtype_name(args->dtype),
                      static_cast<long long>(fa_max(args->head_dim, args->head_dim_v)));
    if (fa_max(args->seqlen_q, args->seqlen_k) > kMaxTensorCoreLength)
        fa_add_reason(reasons, "takes sequences of up to %d rows, not %lld", kMaxTensorCoreLength,
                      static_cast<long long>(fa_max(args->seqlen_q, args->seqlen_k)));
    bool vectors = has_vectors(args, args->q, args->head_dim, args->heads_q) &&
                   has_vectors(args, args->k, args->head_dim, args->heads_kv) &&
                   has_vectors(args, args->v, args->head_dim_v, args->heads_kv) &&
                   has_vectors(args, args->o, args->head_dim_v, args->heads_q);
    if (backward)
        vectors = vectors && has_vectors(args, backward->d_o, args->head_dim_v, args->heads_q) &&
                  has_vectors(args, backward->d_q, args->head_dim, args->heads_q) &&
                  has_vectors(args, backward->d_k, args->head_dim, args->heads_kv) &&
                  has_vectors(args, backward->d_v, args->head_dim_v, args->heads_kv);
    if (!vectors)
        fa_add_reason(reasons, "takes rows of whole 16 bytes, aligned to them (head_dim, strides and addresses)");
}

static void refuse_tensor_core_kvcache(const fa_kvcache_args *args, fa_reasons *reasons) {
    const bool has_16_bits = fa_dtype_bytes(args->dtype) == 2;
    if (!has_16_bits) fa_add_reason(reasons, "takes float16 and bfloat16 queries, not %s", fa_dtype_name(args->dtype));
    if (has_16_bits && fa_cuda_prefills(args)) {
        const fa_forward_args forward = fa_cuda_prefill_forward(args);
        return refuse_tensor_core(&forward, nullptr, reasons);
    }
    const int64_t dim = fa_max(args->head_dim, args->head_dim_v);
    if (dim > kMaxTensorCoreDim)
        fa_add_reason(reasons, "takes head_dim up to %d, not %lld", kMaxTensorCoreDim, static_cast<long long>(dim));
    const auto has_vectors = [](const fa_tensor &t, int64_t width, int64_t bytes) {
        return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
               (t.stride_l | t.stride_h | t.stride_b | width) * bytes % 16 == 0;
    };
    const int64_t bytes = fa_dtype_bytes(args->cache_dtype);
    if (!has_vectors(args->k_cache, args->head_dim, bytes) || !has_vectors(args->v_cache, args->head_dim_v, bytes) ||
        !has_vectors(args->q, args->head_dim, fa_dtype_bytes(args->dtype)))
        fa_add_reason(reasons,
                      "takes rows of whole 16 bytes, aligned to them (head_dim, strides and addresses of q and "
                      "the caches)");
    const auto is_far = [&](int64_t stride) { return stride < 0 || stride * bytes >> 36 != 0; };
    const auto has_far_rows = [&](const fa_tensor &t) { return is_far(t.stride_b) || is_far(t.stride_l); };
    if (has_far_rows(args->k_cache) || has_far_rows(args->v_cache))
        fa_add_reason(reasons, "takes pages and rows less than 64 GiB apart");
    if (reasons->used == 0 && !fa_cuda_tensor_core_decode_fits(args))
        fa_add_reason(reasons, "needs more shared memory than this device has");
}

// Many queries go through the forward's kernels, few through those that read the cache once.
#define CUDA_KVCACHE(NAME, ON_TENSOR_CORES)                                                                            \
    static size_t NAME##_kvcache_bytes(const fa_kvcache_args *args) {                                                  \
        return fa_cuda_prefills(args) ? fa_cuda_prefill_bytes(args, ON_TENSOR_CORES)                                   \
                                      : fa_cuda_##NAME##_decode_bytes(args);                                           \
    }                                                                                                                  \
    static fa_status NAME##_kvcache(const fa_kvcache_args *args) {                                                     \
        return fa_cuda_prefills(args) ? fa_cuda_prefill(args, ON_TENSOR_CORES) : fa_cuda_##NAME##_decode(args);        \
    }
CUDA_KVCACHE(tensor_core, true)
CUDA_KVCACHE(fused, false)

// Packed sequences are no longer than their tensor, whatever max_seqlen says: grids and workspaces follow the shorter.
static fa_forward_args cut(const fa_forward_args *args) {
    fa_forward_args within = *args;
    if (args->cu_seqlens_q) {
        within.seqlen_q = fa_min(args->seqlen_q, args->total_q);
        within.seqlen_k = fa_min(args->seqlen_k, args->total_k);
    }
    return within;
}
static fa_backward_args cut(const fa_backward_args *args) {
    fa_backward_args within = *args;
    within.forward = cut(&args->forward);
    return within;
}

#define CUDA_KERNEL(NAME)                                                                                              \
    static size_t NAME##_forward_bytes(const fa_forward_args *args) {                                                  \
        const fa_forward_args within = cut(args);                                                                      \
        return fa_cuda_##NAME##_forward_bytes(&within);                                                                \
    }                                                                                                                  \
    static fa_status NAME##_forward(const fa_forward_args *args) {                                                     \
        const fa_forward_args within = cut(args);                                                                      \
        FA_CHECK(fa_cuda_fill_padding(&within));                                                                       \
        return fa_cuda_##NAME##_forward(&within);                                                                      \
    }
#define CUDA_KERNEL_BACKWARD(NAME)                                                                                     \
    static size_t NAME##_backward_bytes(const fa_backward_args *args) {                                                \
        const fa_backward_args within = cut(args);                                                                     \
        return fa_cuda_##NAME##_backward_bytes(&within);                                                               \
    }                                                                                                                  \
    static fa_status NAME##_backward(const fa_backward_args *args) {                                                   \
        const fa_backward_args within = cut(args);                                                                     \
        FA_CHECK(fa_cuda_fill_gradient_padding(&within));                                                              \
        return fa_cuda_##NAME##_backward(&within);                                                                     \
    }
CUDA_KERNEL(tensor_core)
CUDA_KERNEL_BACKWARD(tensor_core)
CUDA_KERNEL(fused)
CUDA_KERNEL_BACKWARD(fused)
CUDA_KERNEL(split)
CUDA_KERNEL(naive)
CUDA_KERNEL_BACKWARD(naive)

static const fa_kernel kRows[] = {
    {{FA_TENSOR_CORE, FA_CUDA, "tensor_core"},
     refuse_tensor_core,
     tensor_core_forward_bytes,
     tensor_core_forward,
     tensor_core_backward_bytes,
     tensor_core_backward,
     refuse_tensor_core_kvcache,
     tensor_core_kvcache_bytes,
     tensor_core_kvcache}, // mma.sync
    {{FA_FUSED, FA_CUDA, "fused"},
     nullptr,
     fused_forward_bytes,
     fused_forward,
     fused_backward_bytes,
     fused_backward,
     nullptr,
     fused_kvcache_bytes,
     fused_kvcache}, // tiles and an online softmax
    {{FA_SPLIT, FA_CUDA, "split"},
     refuse_split,
     split_forward_bytes,
     split_forward,
     nullptr,
     nullptr}, // three tiled steps
    {{FA_NAIVE, FA_CUDA, "naive"},
     nullptr,
     naive_forward_bytes,
     naive_forward,
     naive_backward_bytes,
     naive_backward}, // one thread an output, the score matrix in memory
};
extern "C" const fa_kernel_rows fa_cuda_kernel_rows = {kRows, sizeof kRows / sizeof kRows[0]};
