// FlashAttention backward on tensor cores, float16 and bfloat16: the rows of the tile table.
#include "cuda/tensor_core_backward.cuh"

template <typename Element, bool kModified>
static fa_status by_head_dim(const fa_backward_args *args, size_t *bytes) {
    const fa_forward_args &forward = args->forward;
    const bool is_short =
        fa_max(forward.head_dim, forward.head_dim_v) <= 32 || (forward.causal && forward.seqlen_q <= 512);
    fa_status status = FA_OK;
    // clang-format off
    //                                        dim, key warps, halves, m tiles, queries, blocks an SM
    if constexpr (!kModified) // half as many barriers; where sequences are short, more turns balance better
        if (!is_short && try_tile<BackwardTile<Element, 64, 4, 1, 2, 128, 1>, kModified>(args, &status, bytes)) return status;
    if (try_tile<BackwardTile<Element,  32, 4, 1, 2,  64, 1>, kModified>(args, &status, bytes) ||
        try_tile<BackwardTile<Element,  64, 4, 1, 2,  64, 1>, kModified>(args, &status, bytes) ||
        try_tile<BackwardTile<Element,  96, 4, 1, 2,  64, 1>, kModified>(args, &status, bytes) ||
        try_tile<BackwardTile<Element, 128, 4, 1, 2,  64, 1>, kModified>(args, &status, bytes) ||
        try_tile<BackwardTile<Element, 192, 2, 2, 2,  64, 1>, kModified>(args, &status, bytes) ||
        try_tile<BackwardTile<Element, 256, 2, 2, 2,  64, 1>, kModified>(args, &status, bytes) ||
        try_tile<BackwardTile<Element, 128, 2, 1, 2,  32, 2>, kModified>(args, &status, bytes) || // 164 KiB an SM, or 100
        try_tile<BackwardTile<Element, 256, 1, 2, 1,  32, 1>, kModified>(args, &status, bytes))   // the same
        return status;
    // clang-format on
    return fa_fail(FA_ERROR_DEVICE, "tensor core backward: no tile fits the device's shared memory");
}

static fa_status by_dtype(const fa_backward_args *args, size_t *bytes) {
    const bool modified = fa_has_scores_unlike_products(&args->forward);
    if (args->forward.dtype == FA_FLOAT32) return fa_tensor_core_backward_f32(args, modified, bytes);
    if (args->forward.dtype == FA_FLOAT16)
        return modified ? by_head_dim<__half, true>(args, bytes) : by_head_dim<__half, false>(args, bytes);
    return modified ? by_head_dim<__nv_bfloat16, true>(args, bytes) : by_head_dim<__nv_bfloat16, false>(args, bytes);
}

size_t fa_cuda_tensor_core_backward_bytes(const fa_backward_args *args) {
    size_t bytes = 0;
    by_dtype(args, &bytes);
    return bytes;
}

fa_status fa_cuda_tensor_core_backward(const fa_backward_args *args) { return by_dtype(args, nullptr); }
