// FlashAttention forward on tensor cores, float32: the rows of the tile table.
#include "cuda/tensor_core_forward_launch.cuh"

// Two blocks an SM, so that one multiplies while the other has its softmax: 32 keys a turn leave the shared memory for
// both. 32 rows a warp, where the registers hold their O, halve the work of splitting K and V. No tile takes more than
// 97 KiB: a device of 100 KiB an SM holds one block of the widest.
template <unsigned kFeatures>
static fa_status by_head_dim(const fa_forward_args *args) {
    fa_status status = FA_OK;
    // clang-format off
    //                          dim, row warps, column warps, m tiles, keys, stages, keeps Q, blocks an SM
    if (try_tile<ForwardTile<float,  32, 4, 1, 2, 32, 2, false, 2>, kFeatures>(args, &status) ||
        try_tile<ForwardTile<float,  64, 4, 1, kFeatures == kProducts ? 2 : 1, 32, 2, false, 2>, kFeatures>(args, &status) ||
        try_tile<ForwardTile<float, 128, 4, 1, 1, 32, 2, false, 2>, kFeatures>(args, &status))
        return status;
    // clang-format on
    return fa_fail(FA_ERROR_DEVICE, "tensor core forward: no tile fits the device's shared memory");
}

fa_status fa_tensor_core_forward_f32(const fa_forward_args *args) {
    return score_features(*args) == kProducts ? by_head_dim<kProducts>(args) : by_head_dim<kAnyFeature>(args);
}
