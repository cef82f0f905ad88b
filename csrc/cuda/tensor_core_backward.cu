// FlashAttention backward on tensor cores, float16 and bfloat16: the rows of the tile table.
#include "cuda/tensor_core_backward_launch.cuh"

template <typename Element, unsigned kFeatures>
static fa_status by_head_dim(const fa_backward_args *args, size_t *bytes) {
    const fa_forward_args &forward = args->forward;
    const bool is_short =
        fa_max(forward.head_dim, forward.head_dim_v) <= 32 || (forward.causal && forward.seqlen_q <= 1024);
    fa_status status = FA_OK;
    // clang-format off
    //                                        dim, key warps, halves, m tiles, queries, blocks an SM
    if constexpr (kFeatures == kProducts) // half as many barriers; where sequences are short, more turns balance better
        if (!is_short && try_tile<BackwardTile<Element, 64, 4, 1, 2, 128, 1>, kFeatures>(args, &status, bytes)) return status;
    if (try_tile<BackwardTile<Element,  32, 4, 1, 2,  64, 1>, kFeatures>(args, &status, bytes) ||
        try_tile<BackwardTile<Element,  64, 4, 1, 2,  64, 1>, kFeatures>(args, &status, bytes) ||
        try_tile<BackwardTile<Element,  96, 4, 1, 2,  64, 1>, kFeatures>(args, &status, bytes) ||
        try_tile<BackwardTile<Element, 128, 4, 1, 2,  64, 1>, kFeatures>(args, &status, bytes) ||
        try_tile<BackwardTile<Element, 192, 2, 2, 2,  64, 1>, kFeatures>(args, &status, bytes) ||
        try_tile<BackwardTile<Element, 256, 2, 2, 2,  64, 1>, kFeatures>(args, &status, bytes) ||
        try_tile<BackwardTile<Element, 128, 2, 1, 2,  32, 2>, kFeatures>(args, &status, bytes) || // 164 KiB an SM, or 100
        try_tile<BackwardTile<Element, 256, 1, 2, 1,  32, 1>, kFeatures>(args, &status, bytes))   // the same
        return status;
    // clang-format on
    return fa_fail(FA_ERROR_DEVICE, "tensor core backward: no tile fits the device's shared memory");
}

// One feature alone, at the head_dims of most models.
template <typename Element, unsigned kFeature>
static fa_status of_one_feature(const fa_backward_args *args, size_t *bytes) {
    const int64_t dim = fa_max(args->forward.head_dim, args->forward.head_dim_v);
    fa_status status = FA_OK;
    if ((dim > 32 && try_tile<BackwardTile<Element, 64, 4, 1, 2, 64, 1>, kFeature>(args, &status, bytes)) ||
        (dim > 96 && try_tile<BackwardTile<Element, 128, 4, 1, 2, 64, 1>, kFeature>(args, &status, bytes)))
        return status;
    return by_head_dim<Element, kAnyFeature>(args, bytes);
}

template <typename Element>
static fa_status by_features(const fa_backward_args *args, size_t *bytes) {
    switch (args->d_alibi_slopes.data ? kAnyFeature : score_features(args->forward)) {
    case kProducts: return by_head_dim<Element, kProducts>(args, bytes);
    case kSoftcap: return of_one_feature<Element, kSoftcap>(args, bytes);
    case kSlopes: return of_one_feature<Element, kSlopes>(args, bytes);
    case kBias: return of_one_feature<Element, kBias>(args, bytes);
    case kDropout: return of_one_feature<Element, kDropout>(args, bytes);
    default: return by_head_dim<Element, kAnyFeature>(args, bytes);
    }
}

static fa_status by_dtype(const fa_backward_args *args, size_t *bytes) {
    switch (args->forward.dtype) {
    case FA_FLOAT32: return fa_tensor_core_backward_f32(args, bytes);
    case FA_FLOAT16: return by_features<__half>(args, bytes);
    default: return by_features<__nv_bfloat16>(args, bytes);
    }
}

size_t fa_cuda_tensor_core_backward_bytes(const fa_backward_args *args) {
    size_t bytes = 0;
    by_dtype(args, &bytes);
    return bytes;
}

fa_status fa_cuda_tensor_core_backward(const fa_backward_args *args) { return by_dtype(args, nullptr); }
