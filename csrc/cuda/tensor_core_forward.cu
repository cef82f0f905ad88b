// FlashAttention forward on tensor cores, float16 and bfloat16: the rows of the tile table.
#include "cuda/tensor_core_forward.cuh"

// Rows of Q, K and V in shared memory, 32 rows a warp where the registers hold their O, two blocks an SM where they hold
// both. The first tile that fits: rows for less shared memory stand last.
template <typename Element, bool kModified>
static fa_status by_head_dim(const fa_forward_args *args) {
    fa_status status = FA_OK;
    // clang-format off
    //                            dim, row warps, column warps, m tiles, keys, stages, keeps Q, blocks an SM
    if (try_tile<ForwardTile<Element,  32, 4, 1, 2,  64, 2, true,  kModified ? 2 : 3>, kModified>(args, &status) ||
        try_tile<ForwardTile<Element,  64, 4, 1, 2,  64, 2, !kModified, 2>, kModified>(args, &status) ||
        try_tile<ForwardTile<Element,  96, 4, 1, 2,  64, 2, false, 2>, kModified>(args, &status) ||
        try_tile<ForwardTile<Element, 128, 4, 1, 2,  64, 2, false, 2>, kModified>(args, &status))
        return status;
    if constexpr (!kModified) // half as many barriers and exchanges; it needs all of 227 KiB
        if (try_tile<ForwardTile<Element, 192, 4, 2, 2, 128, 1, false, 1>, kModified>(args, &status) ||
            try_tile<ForwardTile<Element, 256, 4, 2, 2, 128, 1, false, 1>, kModified>(args, &status))
            return status;
    if (try_tile<ForwardTile<Element, 192, 4, 2, 2,  64, 2, false, 1>, kModified>(args, &status) ||
        try_tile<ForwardTile<Element, 256, 4, 2, 2,  64, 2, false, 1>, kModified>(args, &status) ||
        try_tile<ForwardTile<Element, 256, 4, 2, 2,  64, 1, false, 1>, kModified>(args, &status) || // 164 KiB an SM
        try_tile<ForwardTile<Element, 256, 2, 2, 1,  32, 2, false, 1>, kModified>(args, &status))   // 100 KiB
        return status;
    // clang-format on
    return fa_fail(FA_ERROR_DEVICE, "tensor core forward: no tile fits the device's shared memory");
}

size_t fa_cuda_tensor_core_forward_bytes(const fa_forward_args *) { return 0; }

fa_status fa_cuda_tensor_core_forward(const fa_forward_args *args) {
    const bool modified = fa_has_scores_unlike_products(args);
    if (args->dtype == FA_FLOAT32) return fa_tensor_core_forward_f32(args, modified);
    if (args->dtype == FA_FLOAT16) return modified ? by_head_dim<__half, true>(args) : by_head_dim<__half, false>(args);
    return modified ? by_head_dim<__nv_bfloat16, true>(args) : by_head_dim<__nv_bfloat16, false>(args);
}
