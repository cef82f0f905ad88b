// From a warp's products to scores: masks and modifications on accumulators of the tensor cores.
//
// A thread holds kMTiles x kNTiles accumulators of 16 x 8, acc[i][j][2 half + e] = row 16 i + 8 half, column 8 j + e from
// the thread's first on. Rows are queries and columns keys; kTransposed: rows are keys and columns queries.
//
// Each step here meets all of a thread's entries, so that its instructions count. Scores therefore keep a unit, score =
// unit * acc, where the factors gather that the first sum or the exponential applies without an instruction of its own.
#ifndef FA_MMA_SCORES_CUH
#define FA_MMA_SCORES_CUH

#include "cuda/mma_bias.cuh"
#include "cuda/mma_dropout.cuh"
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

// acc = cap_out tanh(cap_in acc): by the cubic where all of a warp's entries are near, 6 instructions each with the
// test, else tanh = 1 - 2 / (1 + e^2u), which would cancel there.
template <typename Element, int kMTiles, int kNTiles>
__device__ __forceinline__ void cap_products(float (&acc)[kMTiles][kNTiles][4], const MmaScorePlan &plan) {
    const auto each = [&](const auto &body) {
        each_entry<false, kMTiles, kNTiles>([&](int, int, int i, int j, int entry) { body(acc[i][j][entry], entry); });
    };
    if (sizeof(Element) == 4) {
        each([&](float &x, int) { x = plan.cap_out * tanhf(plan.cap_in * x); });
        return;
    }
    const auto cubic = [&](float x) {
        const float square = x * x;
        const float rest = fmaf(square, fmaf(square, plan.cap[3], plan.cap[2]), plan.cap[1]);
        return x * fmaf(square, rest, plan.cap[0]);
    };
    float most[4] = {}; // four maxima wait less for each other than one
    each([&](float &x, int entry) { most[entry] = fmaxf(most[entry], fabsf(x)); });
    if (__all_sync(~0u, fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])) <= plan.cap_near)) {
        each([&](float &x, int) { x = cubic(x); });
    } else {
        each([&](float &x, int) {
            const float exp_2u = ex2_approx(fabsf(x) * (fabsf(plan.cap_in) * 2.88539008f));
            const float tanh = copysignf(fmaf(-2.0f, rcp_approx(exp_2u + 1), 1.0f), x * plan.cap_in);
            x = fabsf(x) <= plan.cap_near ? cubic(x) : tanh * plan.cap_out;
        });
    }
}

// acc = inner * acc - slope * distance. Rows and columns are 8 apart: all entries of a diagonal share their distance, so
// that a 32 x 64 tile has 22 of them a thread.
template <bool kTransposed, int kMTiles, int kNTiles>
__device__ __forceinline__ void add_distance(float (&acc)[kMTiles][kNTiles][4], float inner, float slope,
                                             float distance0) {
#pragma unroll
    for (int diagonal = 1 - 2 * kMTiles; diagonal < kNTiles; ++diagonal)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float step = static_cast<float>(8 * diagonal + e); // columns less rows
            const float penalty = -slope * fabsf(distance0 + (kTransposed ? step : -step));
#pragma unroll
            for (int row = 0; row < 2 * kMTiles; ++row)
                if (diagonal + row >= 0 && diagonal + row < kNTiles) {
                    float &s = acc[row / 2][diagonal + row][row % 2 * 2 + e];
                    s = fmaf(s, inner, penalty);
                }
        }
}

// acc = the scores, in plan.unit, from products q.k. capped_slope(i, j, entry, slope) hears of the softcap's derivative.
// Where the bias is not staged it comes from global memory.
template <unsigned kFeatures, typename Element, bool kTransposed, typename Tile, int kMTiles, int kNTiles,
          typename Hear>
__device__ __forceinline__ void modify_scores(float (&acc)[kMTiles][kNTiles][4], const fa_forward_args &args,
                                              const fa_sequence &seq, const MmaScorePlan &plan,
                                              const MmaScoreRule &rule, int64_t query0, int64_t key0,
                                              const Hear &capped_slope, const StagedBias<Tile> staged) {
    if (meets<kFeatures, kSoftcap>(plan.caps)) {
        cap_products<Element>(acc, plan);
        each_entry<kTransposed, kMTiles, kNTiles>([&](int, int, int i, int j, int entry) {
            const float x = acc[i][j][entry];
            capped_slope(i, j, entry, fmaf(x * x, plan.cap_slope, 1.0f));
        });
    }
    const bool has_slopes = meets<kFeatures, kSlopes>(plan.has_slopes),
               has_bias = meets<kFeatures, kBias>(plan.has_bias);
    if (has_slopes)
        add_distance<kTransposed>(acc, plan.inner, rule.slope, static_cast<float>(query0 + rule.offset - key0));
    const float inner = has_slopes ? 1.0f : plan.inner;
    if (has_bias && (kFeatures == kBias || staged.is_there)) {
        staged.template add_to<kTransposed>(acc, inner);
    } else if (kFeatures == kAnyFeature && has_bias) {
        const int64_t at = rule.bias_at + query0 * args.bias.stride_q + key0 * args.bias.stride_k;
        const int queries = static_cast<int>(fa_clamp(seq.len_q - query0, 0, 1 << 20)); // from query0 on
        const int keys = static_cast<int>(fa_clamp(seq.len_k - key0, 0, 1 << 20));
        if (args.bias.dtype == FA_FLOAT32)
            add_bias<float, kTransposed>(acc, inner, args.bias, at, queries, keys);
        else
            add_bias<Element, kTransposed>(acc, inner, args.bias, at, queries, keys);
    } else if (kFeatures == kAnyFeature && plan.flips && !has_slopes) {
        each_entry<kTransposed, kMTiles, kNTiles>(
            [&](int, int, int i, int j, int entry) { acc[i][j][entry] *= inner; });
    }
}

#endif
