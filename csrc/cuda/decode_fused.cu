// Which turn on CUDA cores serves a request, and its launch: there is one for every request.
#include "cuda/decode_fused.cuh"

// Calls f with the tile of as many stages of 32 KiB as fit: five on Hopper, or two, in 99 KiB, which every device has.
template <typename Real, int kDim, int kRows, typename F>
static auto by_stages(const F &f) {
    using Small = FusedDecode<Real, kDim, kRows, 2>;
    static_assert(sizeof(DecodeSmem<Small>) <= 99 * 1024);
    if constexpr (sizeof(Real) == 4) {
        using Large = FusedDecode<Real, kDim, kRows, 5>;
        static_assert(sizeof(DecodeSmem<Large>) <= 227 * 1024);
        if (decode_fits<Large>()) return f(Large());
    }
    return f(Small());
}

// Rows of a line: as many as leave their sums in the registers of the folders.
template <typename F>
static auto by_head_dim(const fa_kvcache_args *args, const F &f) {
    const int64_t dim = fa_max(args->head_dim, args->head_dim_v);
    if (args->dtype == FA_FLOAT64) {
        if (dim <= 64) return by_stages<double, 64, 8>(f);
        if (dim <= 128) return by_stages<double, 128, 8>(f);
        return dim <= 256 ? by_stages<double, 256, 4>(f) : by_stages<double, 512, 2>(f);
    }
    if (dim <= 64) return by_stages<float, 64, 16>(f);
    if (dim <= 128) return by_stages<float, 128, 16>(f);
    return dim <= 256 ? by_stages<float, 256, 8>(f) : by_stages<float, 512, 4>(f);
}

size_t fa_cuda_fused_decode_bytes(const fa_kvcache_args *args) {
    return by_head_dim(args, [&](auto tile) { return decode_bytes<decltype(tile)>(args); });
}
fa_status fa_cuda_fused_decode(const fa_kvcache_args *args) {
    return by_head_dim(args, [&](auto tile) -> fa_status {
        using Tile = decltype(tile);
        FA_REQUIRE(decode_fits<Tile>(), FA_ERROR_DEVICE,
                   "decode: needs %zu bytes of shared memory, the device has less", sizeof(DecodeSmem<Tile>));
        return launch_decode<Tile>(args);
    });
}
