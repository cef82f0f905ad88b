// Dropout on the tensor cores: which entries of P are kept.
//
// A thread's eight entries of a 16 x 16 tile of scores, two accumulators side by side, are a group of philox.h; word n of
// its call holds the pair n = 2 (side) + half that from_scores packs into word n of an A. Transposed, they belong to two groups.
#ifndef FA_MMA_DROPOUT_CUH
#define FA_MMA_DROPOUT_CUH

#include "cuda/ptx/math.cuh"
#include "cuda/score_plan.cuh"

// Each half of word n of tile i: all its bits set where dropout keeps that entry of the pair n of the group that this thread
// holds in the tile that starts at (query0 + 16 i, key0), multiples of 16.
template <int kTiles>
__device__ __forceinline__ void keep_masks(uint32_t (&words)[kTiles][4], const MmaScorePlan &plan,
                                           const MmaScoreRule &rule, int query0, int key0) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        words[i][0] = static_cast<uint32_t>(query0 / 2 + 8 * i + lane / 4); // fa_dropout_row_word(query0 + lane / 4)
        words[i][1] = static_cast<uint32_t>(key0 / 4 + lane % 4);           // fa_dropout_col_word(key0 + lane % 4 * 2)
        words[i][2] = rule.dropout_head, words[i][3] = plan.dropout_offset;
    }
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint2 keys = *reinterpret_cast<const uint2 *>(rule.dropout_keys[round]);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) fa_philox_round(words[i], keys.x, keys.y); // each waits for its products
    }
    // field >= threshold: the carry out of 15 bits, and or or the 16th bit
    const uint32_t rest = plan.dropout_rest, either = plan.dropout_either;
#pragma unroll
    for (auto &of_tile : words)
#pragma unroll
        for (uint32_t &word : of_tile) {
            const uint32_t carry = (word & 0x7FFF7FFF) + rest;
            word = sign_halves((word & carry) | (word & either) | (carry & either));
        }
}

// Transposed: which entries of kTiles tiles of 16 x 16 are kept, tile n at (query0 + 16 n, key0). Bit 16 e + 4 n + 2 half +
// side is entry 2 half + e of accumulator `side`. By all lanes of a warp.
template <int kTiles>
__device__ __forceinline__ uint32_t kept_transposed(const MmaScorePlan &plan, const MmaScoreRule &rule, int query0,
                                                    int key0) {
    static_assert(kTiles == 1 || kTiles == 2 || kTiles == 4, "two tiles at a time, 16 bits for each of two columns");
    constexpr int kBeside = kTiles < 2 ? 1 : 2;
    uint32_t kept = 0; // of this thread's own groups: bit 16 (key % 2) + 4 n + 2 (key / 8) + query / 8
#pragma unroll
    for (int n = kTiles - kBeside; n >= 0; n -= kBeside) {
        uint32_t masks[kBeside][4];
        keep_masks(masks, plan, rule, query0 + 16 * n, key0);
#pragma unroll
        for (int word = 4 * kBeside - 1; word >= 0; --word)
            kept = (kept << 1 & 0xFFFEFFFE) | (masks[word / 4][word % 4] & 0x10001);
    }
    // Key g and queries 2t, 2t + 1 of this lane 4 g + t: rows 2t, 2t + 1 of the groups, in columns g / 2.
    const int lane = static_cast<int>(threadIdx.x) % 32, from = lane % 4 * 8 + lane / 8;
    const uint32_t even = __shfl_sync(~0u, kept, from), odd = __shfl_sync(~0u, kept, from + 4);
    return __byte_perm(even, odd, lane & 4 ? 0x7632 : 0x5410);
}

// All bits of each half set where the pair (entries 2 half, 2 half + 1 of accumulator `side` of tile n) is kept.
__device__ __forceinline__ uint32_t kept_pair(uint32_t kept, int n, int side, int half) {
    return sign_halves(kept << (15 - 4 * n - 2 * half - side));
}

#endif
