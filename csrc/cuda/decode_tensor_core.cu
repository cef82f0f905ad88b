// Which turn on tensor cores serves a request, and its launch.
#include "cuda/decode_tensor_core.cuh"

// Calls f with a tile for the request's head_dim that fits the device: stages of 32 KiB on Hopper, fewer elsewhere.
template <typename Element, typename Cache, typename F>
static auto by_head_dim(const fa_kvcache_args *args, const F &f) {
    constexpr int kScale = sizeof(Element) / sizeof(Cache);
    using Small64 = TensorCoreDecode<Element, Cache, 64, 4 * kScale>;
    using Small128 = TensorCoreDecode<Element, Cache, 128, 3 * kScale>;
    using Small256 = TensorCoreDecode<Element, Cache, 256, 3 * kScale>;
    const int64_t dim = fa_max(args->head_dim, args->head_dim_v);
    if (dim <= 64) {
        using Large = TensorCoreDecode<Element, Cache, 64, 8 * kScale>;
        return decode_fits<Large>() ? f(Large()) : f(Small64());
    }
    if (dim <= 128) {
        using Large = TensorCoreDecode<Element, Cache, 128, 5 * kScale>;
        return decode_fits<Large>() ? f(Large()) : f(Small128());
    }
    using Large = TensorCoreDecode<Element, Cache, 256, 5 * kScale>;
    return decode_fits<Large>() ? f(Large()) : f(Small256());
}

template <typename F>
static auto by_dtype(const fa_kvcache_args *args, const F &f) {
    const bool is_float8 = args->cache_dtype == FA_FLOAT8_E4M3;
    if (args->dtype == FA_FLOAT16)
        return is_float8 ? by_head_dim<__half, uint8_t>(args, f) : by_head_dim<__half, __half>(args, f);
    return is_float8 ? by_head_dim<__nv_bfloat16, uint8_t>(args, f)
                     : by_head_dim<__nv_bfloat16, __nv_bfloat16>(args, f);
}

// The kernels are described by their types alone: no object of them exists on the host.
bool fa_cuda_tensor_core_decode_fits(const fa_kvcache_args *args) {
    return by_dtype(args, [](auto tile) { return decode_fits<decltype(tile)>(); });
}
size_t fa_cuda_tensor_core_decode_bytes(const fa_kvcache_args *args) {
    return by_dtype(args, [&](auto tile) { return decode_bytes<decltype(tile)>(args); });
}
fa_status fa_cuda_tensor_core_decode(const fa_kvcache_args *args) {
    return by_dtype(args, [&](auto tile) { return launch_decode<decltype(tile)>(args); });
}
