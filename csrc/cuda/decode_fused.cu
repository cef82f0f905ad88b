// Which tile on CUDA cores serves a request, and its launch: there is one for every request.
#include "cuda/decode_fused.cuh"

// With two stages, which any device has room for.
template <typename F>
static auto by_head_dim(const fa_kvcache_args *args, const F &f) {
    const int64_t dim = fa_max(args->head_dim, args->head_dim_v);
    if (args->dtype == FA_FLOAT64) {
        if (dim <= 64) return f(FusedDecode<double, 64, 8>());
        if (dim <= 128) return f(FusedDecode<double, 128, 8>());
        return dim <= 256 ? f(FusedDecode<double, 256, 4>()) : f(FusedDecode<double, 512, 2>());
    }
    if (dim <= 64) return f(FusedDecode<float, 64, 16>());
    if (dim <= 128) return f(FusedDecode<float, 128, 16>());
    return dim <= 256 ? f(FusedDecode<float, 256, 8>()) : f(FusedDecode<float, 512, 4>());
}

size_t fa_cuda_fused_decode_bytes(const fa_kvcache_args *args) {
    return by_head_dim(args, [&](auto tile) { return decode_bytes<decltype(tile)>(args); });
}
fa_status fa_cuda_fused_decode(const fa_kvcache_args *args) {
    return by_head_dim(args, [&](auto tile) -> fa_status {
        using Tile = decltype(tile);
        FA_REQUIRE(decode_fits<Tile>(), FA_ERROR_DEVICE,
                   "decode: needs %zu bytes of shared memory, the device has less",
                   sizeof(DecodeSmem<Tile>) + sizeof(typename Tile::Stage));
        return launch_decode<Tile>(args);
    });
}
