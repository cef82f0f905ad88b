// A bias on accumulators of the tensor cores, as mma_scores.cuh numbers them: from global memory, or staged in shared.
#ifndef FA_MMA_BIAS_CUH
#define FA_MMA_BIAS_CUH

#include "cuda/mma_tile.cuh"
#include "cuda/ptx/global.cuh"

// acc = inner * acc + bias, from global memory.
template <typename Bias, bool kTransposed, int kMTiles, int kNTiles>
__device__ __forceinline__ void add_bias(float (&acc)[kMTiles][kNTiles][4], float inner, const fa_bias &bias,
                                         int64_t first, int queries, int keys) {
    using Pair = std::conditional_t<sizeof(Bias) == 4, float2, uint32_t>;
    const Bias *at = static_cast<const Bias *>(bias.data) + first;
    const int64_t stride_q = bias.stride_q, stride_k = bias.stride_k;
    const bool pairs =
        !kTransposed && stride_k == 1 && stride_q % 2 == 0 && reinterpret_cast<uintptr_t>(at) % sizeof(Pair) == 0;
    if (pairs && queries > 16 * kMTiles - 8 && keys > 8 * kNTiles - 7) {
        constexpr int kBatch = kNTiles < 4 ? kNTiles : 4; // loads under way; more would not find registers
#pragma unroll
        for (int row = 0; row < 2 * kMTiles; ++row, at += 8 * stride_q)
#pragma unroll
            for (int j0 = 0; j0 < kNTiles; j0 += kBatch) {
                Pair pair[kBatch];
#pragma unroll
                for (int j = 0; j < kBatch; ++j) pair[j] = *reinterpret_cast<const Pair *>(at + 8 * (j0 + j));
#pragma unroll
                for (int j = 0; j < kBatch; ++j) {
                    float2 x;
                    if constexpr (sizeof(Bias) == 4)
                        x = pair[j];
                    else
                        x = unpack(pair[j], kDtype<Bias>);
                    float *s = &acc[row / 2][j0 + j][row % 2 * 2];
                    s[0] = fmaf(s[0], inner, x.x), s[1] = fmaf(s[1], inner, x.y);
                }
            }
        return;
    }
    using Bits = std::conditional_t<sizeof(Bias) == 4, uint32_t, uint16_t>;
    const int64_t stride_row = kTransposed ? stride_k : stride_q, stride_col = kTransposed ? stride_q : stride_k;
    const int rows = kTransposed ? keys : queries, cols = kTransposed ? queries : keys;
#pragma unroll
    for (int row = 0; row < 2 * kMTiles; ++row, at += 8 * stride_row) {
        const Bias *entry = at;
#pragma unroll
        for (int j = 0; j < kNTiles; ++j, entry += 8 * stride_col)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float &s = acc[row / 2][j][row % 2 * 2 + e];
                Bits bits = 0;
                if (8 * row < rows && 8 * j + e < cols)
                    bits = load_global(reinterpret_cast<const Bits *>(entry + e * stride_col));
                s = fmaf(s, inner, static_cast<float>(reinterpret_cast<const Bias &>(bits)));
            }
    }
}

// A warp's part of the bias in shared memory: from row0, key0 of a tile on, whose rows are queries; where it is there at all.
template <typename Tile>
struct StagedBias {
    bool is_there;
    Tile *tile;
    int row0, key0;

    // acc = inner * acc + bias.
    template <bool kTransposed, int kMTiles, int kNTiles>
    __device__ __forceinline__ void add_to(float (&acc)[kMTiles][kNTiles][4], float inner) const {
        if constexpr (sizeof(typename Tile::Element) == 2) { // as the dtype that is staged
            using M = Mma<typename Tile::Element>;
            const auto place =
                kTransposed ? M::place_a_transposed(*tile, row0, key0 / 8) : M::place_a(*tile, row0, key0 / 8);
#pragma unroll
            for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                for (int j = 0; j < kNTiles; j += 2) {
                    typename M::A pairs;
                    if (kTransposed)
                        M::load_a_transposed(pairs, place, 16 * i, 8 * j);
                    else
                        M::load_a(pairs, place, 16 * i, 8 * j);
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const float2 x = unpack(pairs.x[n], kDtype<typename Tile::Element>);
                        float *s = &acc[i][j + n / 2][n % 2 * 2];
                        s[0] = fmaf(s[0], inner, x.x), s[1] = fmaf(s[1], inner, x.y);
                    }
                }
        }
    }

    // Copies it by cp.async, where rows of the bias are made of 16 bytes, aligned: kRows queries, kKeys keys from the head's
    // (query, key) on, zeros from query_end and key_end on.
    template <int kRows, int kKeys>
    __device__ __forceinline__ void copy(const fa_bias &bias, int64_t head_at, int query, int query_end, int key,
                                         int key_end) const {
        constexpr int kAcross = kKeys < 32 ? kKeys / 8 : 4, kDown = 32 / kAcross; // of a warp: whole groups of 8 rows
        const int row = static_cast<int>(threadIdx.x) % 32 / kAcross, column = static_cast<int>(threadIdx.x) % kAcross;
        const LanePlace<Tile> place(*tile, row0 + row, key0 / 8 + column);
        const auto *from = static_cast<const typename Tile::Element *>(bias.data) + head_at +
                           (query + row) * bias.stride_q + key + 8 * column;
        int bytes[kKeys / 8 / kAcross];
#pragma unroll
        for (int j = 0; j < kKeys / 8; j += kAcross)
            bytes[j / kAcross] = 2 * min(max(key_end - key - 8 * (column + j), 0), 8);
#pragma unroll
        for (int i = 0; i < kRows; i += kDown, from += kDown * bias.stride_q)
#pragma unroll
            for (int j = 0; j < kKeys / 8; j += kAcross)
                cp_async_16_part(place.at(i, j), from + 8 * j, query + row + i < query_end ? bytes[j / kAcross] : 0);
    }
};

#endif
