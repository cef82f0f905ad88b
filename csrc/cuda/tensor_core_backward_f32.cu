// FlashAttention backward on tensor cores, float32: the rows of the tile table.
#include "cuda/tensor_core_backward_launch.cuh"

// Eight warps an SM, which take 255 registers: two blocks of four where the shared memory holds both, so that one
// multiplies while the other waits. A warp's 16 or 32 keys are those whose dK or dV its registers hold.
template <unsigned kFeatures>
static fa_status by_head_dim(const fa_backward_args *args, size_t *bytes) {
    fa_status status = FA_OK;
    // clang-format off
    //                           dim, key warps, halves, m tiles, queries, blocks an SM
    if (try_tile<BackwardTile<float,  32, 2, 1, 2, 32, 2>, kFeatures>(args, &status, bytes) ||
        try_tile<BackwardTile<float,  64, 2, 1, 2, 32, 2>, kFeatures>(args, &status, bytes) ||
        try_tile<BackwardTile<float, 128, 4, 1, 1, 32, 1>, kFeatures>(args, &status, bytes) ||
        try_tile<BackwardTile<float, 128, 2, 1, 1, 16, 1>, kFeatures>(args, &status, bytes)) // 100 KiB an SM
        return status;
    // clang-format on
    return fa_fail(FA_ERROR_DEVICE, "tensor core backward: no tile fits the device's shared memory");
}

fa_status fa_tensor_core_backward_f32(const fa_backward_args *args, size_t *bytes) {
    return score_features(args->forward) == kProducts ? by_head_dim<kProducts>(args, bytes)
                                                      : by_head_dim<kAnyFeature>(args, bytes);
}
