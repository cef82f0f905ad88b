// From products to scores: which of a thread's entries its row sees, and what they are.
#ifndef FA_SCORES_CUH
#define FA_SCORES_CUH

#include "cuda/dropout.cuh"

// The keys key0 + n that a query sees: lo <= n < hi.
struct Span {
    int lo, hi;
};

// whole: the query is in its sequence and sees every key of the tile.
__device__ __forceinline__ Span span_of(const fa_forward_args &args, const fa_sequence &seq, int64_t query,
                                        int64_t key0, bool whole) {
    constexpr int64_t kFar = 1 << 20; // wider than any tile
    if (whole) return {-1, static_cast<int>(kFar)};
    if (query >= seq.len_q) return {0, 0};
    const fa_interval keys = fa_visible_keys(&args, &seq, query);
    return {static_cast<int>(fa_clamp(keys.lo - key0, -kFar, kFar)),
            static_cast<int>(fa_clamp(keys.hi - key0, -kFar, kFar))};
}

// The score of key key0 + n from s = softmax_scale * q.k; -inf where the query does not see it.
template <bool kModified, typename Real>
__device__ __forceinline__ Real score_of(const ScoreRule<Real> &rule, Real s, int64_t query, int64_t key0, int n,
                                         const Span &keys, Real *cap_slope = nullptr) {
    Real unused;
    if (n < keys.lo || n >= keys.hi) return -infinity(Real());
    return kModified ? rule.score(s, query, key0 + n, cap_slope ? cap_slope : &unused) : s;
}

#endif
