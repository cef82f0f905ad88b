// From a warp's products to scores: masks and modifications on accumulators of the tensor cores.
//
// A thread holds kMTiles x kNTiles accumulators of 16 x 8, acc[i][j][2 half + e] = row 16 i + 8 half, column 8 j + e from
// the thread's first on. Rows are queries and columns keys; kTransposed: rows are keys and columns queries.
#ifndef FA_MMA_SCORES_CUH
#define FA_MMA_SCORES_CUH

#include "cuda/mma_tile.cuh"
#include "cuda/scores.cuh"

// Calls body(query, key, i, j, entry) for each entry, with its distance from the thread's first query and key.
template <bool kTransposed, int kMTiles, int kNTiles, typename Body>
__device__ __forceinline__ void each_entry(const Body &body) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int entry = 0; entry < 4; ++entry) {
                const int row = 16 * i + entry / 2 * 8, col = 8 * j + entry % 2;
                body(kTransposed ? col : row, kTransposed ? row : col, i, j, entry);
            }
}

// -inf where a query does not see a key.
template <bool kTransposed, int kMTiles, int kNTiles>
__device__ __forceinline__ void hide_scores(float (&acc)[kMTiles][kNTiles][4], const fa_forward_args &args,
                                            const fa_sequence &seq, int64_t query0, int64_t key0) {
    constexpr int kQueries = kTransposed ? 2 * kNTiles : 2 * kMTiles; // of a thread
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
        const int step = kTransposed ? n / 2 * 8 + n % 2 : 8 * n;
        const Span keys = span_of(args, seq, query0 + step, key0, false);
        each_entry<kTransposed, kMTiles, kNTiles>([&](int query, int key, int i, int j, int entry) {
            if (query == step && (key < keys.lo || key >= keys.hi)) acc[i][j][entry] = -infinity(0.0f);
        });
    }
}

template <typename Element>
__device__ __forceinline__ float capped(float x) {
    return sizeof(Element) == 4 ? tanhf(x) : tanh_approx(x);
}

// acc = the scores, from products q.k. capped_slope(i, j, entry, slope) hears of the softcap's derivative.
template <typename Element, bool kTransposed, int kMTiles, int kNTiles, typename Hear>
__device__ __forceinline__ void modify_scores(float (&acc)[kMTiles][kNTiles][4], const fa_forward_args &args,
                                              const fa_sequence &seq, const ScoreRule<float> &rule, int64_t query0,
                                              int64_t key0, const Hear &capped_slope) {
    const float scale = static_cast<float>(args.softmax_scale);
    if (rule.softcap > 0) {
        const float scale_in = scale * rule.softcap_inverse;
        each_entry<kTransposed, kMTiles, kNTiles>([&](int, int, int i, int j, int entry) {
            const float t = capped<Element>(acc[i][j][entry] * scale_in);
            acc[i][j][entry] = rule.softcap * t;
            capped_slope(i, j, entry, 1 - t * t);
        });
    } else {
        each_entry<kTransposed, kMTiles, kNTiles>(
            [&](int, int, int i, int j, int entry) { acc[i][j][entry] *= scale; });
    }
    if (rule.slope != 0) {
        const float distance0 = static_cast<float>(query0 + rule.offset - key0);
        each_entry<kTransposed, kMTiles, kNTiles>([&](int query, int key, int i, int j, int entry) {
            acc[i][j][entry] -= rule.slope * fabsf(distance0 + static_cast<float>(query - key));
        });
    }
    if (rule.bias) {
        const fa_bias &bias = *rule.bias;
        const int64_t at = rule.bias_at + query0 * bias.stride_q + key0 * bias.stride_k;
        const int queries = static_cast<int>(fa_min(seq.len_q - query0, 1 << 20));
        const int keys = static_cast<int>(fa_min(seq.len_k - key0, 1 << 20));
        each_entry<kTransposed, kMTiles, kNTiles>([&](int query, int key, int i, int j, int entry) {
            if (query < queries && key < keys)
                acc[i][j][entry] +=
                    load<float>(bias.data, bias.dtype, at + query * bias.stride_q + key * bias.stride_k);
        });
    }
}

// P = 0 where dropout takes it, in two accumulators side by side: the group of philox.h, whose tile of 16 x 16 they are.
// query, key: of the thread's first entry.
__device__ __forceinline__ void drop(float (&left)[4], float (&right)[4], const ScoreRule<float> &rule, int64_t query,
                                     int64_t key) {
    uint32_t words[4] = {fa_dropout_row_word(query), fa_dropout_col_word(key), rule.dropout_head, rule.dropout_offset};
    fa_philox(words, static_cast<uint32_t>(rule.dropout_seed), static_cast<uint32_t>(rule.dropout_seed >> 32));
#pragma unroll
    for (int entry = 0; entry < 8; ++entry) {
        const uint32_t word = words[entry / 2], bits = entry % 2 ? word >> 16 : word & 0xFFFFu;
        if (bits < rule.dropout_threshold) (entry < 4 ? left[entry] : right[entry - 4]) = 0;
    }
}

#endif
