// Which tile on tensor cores serves a request, and its launch; caches with and without pages in files of their own.
#ifndef FA_DECODE_TENSOR_CORE_LAUNCH_CUH
#define FA_DECODE_TENSOR_CORE_LAUNCH_CUH

#include "cuda/decode_launch.cuh"
#include "cuda/decode_tensor_core.cuh"

// Calls f with the tile for the request's head_dim and, if the device has shared memory for it, for its rows. The kernels are
// described by their types alone: no object of them exists on the host.
template <bool kPaged, typename Element, typename Cache, int kDim, typename F>
static auto by_rows(const fa_kvcache_args *args, const F &f) {
    using Tile8 = TensorCoreDecode<Element, Cache, kDim, 8, kPaged>;
    using Tile16 = TensorCoreDecode<Element, Cache, kDim, 16, kPaged>;
    return args->heads_q / args->heads_kv * args->seqlen_q > 8 && decode_fits<Tile16>() ? f(Tile16()) : f(Tile8());
}

template <bool kPaged, typename Element, typename Cache, typename F>
static auto by_head_dim(const fa_kvcache_args *args, const F &f) {
    const int64_t dim = fa_max(args->head_dim, args->head_dim_v);
    if (dim <= 64) return by_rows<kPaged, Element, Cache, 64>(args, f);
    if (dim <= 128) return by_rows<kPaged, Element, Cache, 128>(args, f);
    return by_rows<kPaged, Element, Cache, 256>(args, f);
}
template <bool kPaged, typename F>
static auto by_dtype(const fa_kvcache_args *args, const F &f) {
    const bool is_float8 = args->cache_dtype == FA_FLOAT8_E4M3;
    if (args->dtype == FA_FLOAT16)
        return is_float8 ? by_head_dim<kPaged, __half, uint8_t>(args, f) : by_head_dim<kPaged, __half, __half>(args, f);
    return is_float8 ? by_head_dim<kPaged, __nv_bfloat16, uint8_t>(args, f)
                     : by_head_dim<kPaged, __nv_bfloat16, __nv_bfloat16>(args, f);
}

// As fa_cuda_tensor_core_decode_fits, _bytes and fa_cuda_tensor_core_decode.
struct TensorCoreDecodeKernels {
    bool (*fits)(const fa_kvcache_args *args);
    size_t (*bytes)(const fa_kvcache_args *args);
    fa_status (*launch)(const fa_kvcache_args *args);
};
template <bool kPaged>
constexpr TensorCoreDecodeKernels tensor_core_decode_kernels() {
    return {[](const fa_kvcache_args *args) {
                return by_dtype<kPaged>(args, [](auto tile) { return decode_fits<decltype(tile)>(); });
            },
            [](const fa_kvcache_args *args) {
                return by_dtype<kPaged>(args, [&](auto tile) { return decode_bytes<decltype(tile)>(args); });
            },
            [](const fa_kvcache_args *args) {
                return by_dtype<kPaged>(args, [&](auto tile) { return launch_decode<decltype(tile)>(args); });
            }};
}
extern const TensorCoreDecodeKernels fa_paged_tensor_core_decode;

#endif
