// Which tile on CUDA cores serves a request, and its launch: there is one for every request.
#include "cuda/decode_fused.cuh"
#include "cuda/decode_launch.cuh"

// The tile of these rows, or of half as many, with two stages: that fits any device.
template <typename Real, int kDim, int kRows, typename F>
static auto by_rows(const F &f) {
    using Tile = FusedDecode<Real, kDim, kRows>;
    using Small = FusedDecode<Real, kDim, kRows / 2>;
    static_assert(decode_shared_bytes<Small>(2) <= kAnySharedBytes);
    return decode_fits<Tile>() ? f(Tile()) : f(Small());
}

template <typename F>
static auto by_head_dim(const fa_kvcache_args *args, const F &f) {
    const int64_t dim = fa_max(args->head_dim, args->head_dim_v);
    if (args->dtype == FA_FLOAT64) {
        if (dim <= 64) return by_rows<double, 64, 8>(f);
        if (dim <= 128) return by_rows<double, 128, 8>(f);
        return dim <= 256 ? by_rows<double, 256, 4>(f) : by_rows<double, 512, 2>(f);
    }
    if (dim <= 64) return by_rows<float, 64, 16>(f);
    if (dim <= 128) return by_rows<float, 128, 16>(f);
    return dim <= 256 ? by_rows<float, 256, 8>(f) : by_rows<float, 512, 4>(f);
}

size_t fa_cuda_fused_decode_bytes(const fa_kvcache_args *args) {
    return by_head_dim(args, [&](auto tile) { return decode_bytes<decltype(tile)>(args); });
}
fa_status fa_cuda_fused_decode(const fa_kvcache_args *args) {
    return by_head_dim(args, [&](auto tile) -> fa_status {
        using Tile = decltype(tile);
        FA_REQUIRE(decode_fits<Tile>(), FA_ERROR_DEVICE,
                   "decode: needs %zu bytes of shared memory, the device has less", decode_shared_bytes<Tile>(2));
        return launch_decode<Tile>(args);
    });
}
