// FlashAttention forward on tensor cores, float16 and bfloat16: the rows of the tile table.
#include "cuda/tensor_core_forward_launch.cuh"

// Rows of Q, K and V in shared memory, 32 rows a warp where the registers hold their O, two blocks an SM where they hold
// both. The first tile that fits: rows for less shared memory stand last.
template <typename Element, unsigned kFeatures>
static fa_status by_head_dim(const fa_forward_args *args) {
    constexpr bool kModified = kFeatures != kProducts;
    const bool is_short = args->causal && args->seqlen_q <= 1024 && fa_max(args->head_dim, args->head_dim_v) > 192;
    fa_status status = FA_OK;
    // clang-format off
    //                            dim, row warps, column warps, m tiles, keys, stages, keeps Q, blocks an SM
    if (try_tile<ForwardTile<Element,  32, 4, 1, 2,  64, 2, true,  kModified ? 2 : 3>, kFeatures>(args, &status) ||
        try_tile<ForwardTile<Element,  64, 4, 1, 2,  64, 2, !kModified, 2>, kFeatures>(args, &status) ||
        try_tile<ForwardTile<Element,  96, 4, 1, 2,  64, 2, false, 2>, kFeatures>(args, &status) ||
        try_tile<ForwardTile<Element, 128, 4, 1, 2,  64, 2, false, 2>, kFeatures>(args, &status))
        return status;
    if constexpr (!kModified) // short: one block computes while the other's first rows arrive, and fewer scores are hidden
        if (is_short && fits_tile<ForwardTile<Element, 256, 4, 2, 2, 128, 1, false, 1>, kFeatures>() && // 227 KiB: for both
            try_tile<ForwardTile<Element, 256, 2, 2, 2, 64, 1, false, 2>, kFeatures>(args, &status))
            return status;
    if constexpr (!kModified) // half as many barriers and exchanges; it needs all of 227 KiB
        if (try_tile<ForwardTile<Element, 192, 4, 2, 2, 128, 1, false, 1>, kFeatures>(args, &status) ||
            try_tile<ForwardTile<Element, 256, 4, 2, 2, 128, 1, false, 1>, kFeatures>(args, &status))
            return status;
    if (try_tile<ForwardTile<Element, 192, 4, 2, 2,  64, 2, false, 1>, kFeatures>(args, &status) ||
        try_tile<ForwardTile<Element, 256, 4, 2, 2,  64, 2, false, 1>, kFeatures>(args, &status) ||
        try_tile<ForwardTile<Element, 256, 4, 2, 2,  64, 1, false, 1>, kFeatures>(args, &status) || // 164 KiB an SM
        try_tile<ForwardTile<Element, 256, 2, 2, 1,  32, 2, false, 1>, kFeatures>(args, &status))   // 100 KiB
        return status;
    // clang-format on
    return fa_fail(FA_ERROR_DEVICE, "tensor core forward: no tile fits the device's shared memory");
}

// One feature alone, at the head_dims of most models.
template <typename Element, unsigned kFeature>
static fa_status of_one_feature(const fa_forward_args *args) {
    const int64_t dim = fa_max(args->head_dim, args->head_dim_v);
    fa_status status = FA_OK;
    // clang-format off
    if ((dim > 32 && try_tile<ForwardTile<Element,  64, 4, 1, 2, 64, 2, false, 2>, kFeature>(args, &status)) ||
        (dim > 96 && try_tile<ForwardTile<Element, 128, 4, 1, 2, 64, 2, false, 2>, kFeature>(args, &status)))
        return status;
    // clang-format on
    return by_head_dim<Element, kAnyFeature>(args);
}

template <typename Element>
static fa_status by_features(const fa_forward_args *args) {
    switch (score_features(*args)) {
    case kProducts: return by_head_dim<Element, kProducts>(args);
    case kSoftcap: return of_one_feature<Element, kSoftcap>(args);
    case kSlopes: return of_one_feature<Element, kSlopes>(args);
    case kBias: return of_one_feature<Element, kBias>(args);
    case kDropout: return of_one_feature<Element, kDropout>(args);
    default: return by_head_dim<Element, kAnyFeature>(args);
    }
}

size_t fa_cuda_tensor_core_forward_bytes(const fa_forward_args *) { return 0; }

fa_status fa_cuda_tensor_core_forward(const fa_forward_args *args) {
    switch (args->dtype) {
    case FA_FLOAT32: return fa_tensor_core_forward_f32(args);
    case FA_FLOAT16: return by_features<__half>(args);
    default: return by_features<__nv_bfloat16>(args);
    }
}
