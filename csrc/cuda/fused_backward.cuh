// What the kernels of the fused backward share. After those of backward.cuh come
//
//   fused_backward_kv.cu      dK, dV: a block owns keys and walks over the queries of its group of heads
//   fused_backward_q.cu       dQ, and what d_alibi_slopes is the sum of: a block owns queries and walks over keys
//   fused_backward_bias.cu    d_bias: a block owns a tile of the bias and walks over what it broadcasts to
//   fused_backward.cu         the plan, and the order of all these
//
// Each gradient is summed by one thread in one order: no atomics, the same bits on every run. The price is that S and dP
// are computed twice, seven products instead of five.
#ifndef FA_FUSED_BACKWARD_CUH
#define FA_FUSED_BACKWARD_CUH

#include "cuda/backward.cuh"

enum { kSlopeBlock = 64 }; // queries behind an element of slope_sums

fa_status fa_fused_backward_kv(const fa_backward_args *args, const BackwardPlan &plan);
fa_status fa_fused_backward_q(const fa_backward_args *args, const BackwardPlan &plan);
fa_status fa_fused_backward_bias(const fa_backward_args *args, const BackwardPlan &plan);

// One entry: from the product q.k and dP to P, as V's gradient takes it, and dS. Returns dS before the softcap, the
// gradient of bias and slopes. keep: 1 / (1 - dropout_p).
template <bool kModified, typename Real>
__device__ __forceinline__ Real gradient_of(const ScoreRule<Real> &rule, Real &s, Real &dp, int64_t query, int64_t key0,
                                            int n, const Span &keys, Real scale, Real lse, Real correction, Real delta,
                                            Real keep) {
    Real cap_slope = 1;
    const Real score = score_of<kModified>(rule, product(s, scale), query, key0, n, keys, &cap_slope);
    const Real p = exp_of(score - lse - correction);
    const bool is_kept = !kModified || rule.keeps(query, key0 + n);
    s = is_kept ? p : Real(0);
    const Real ds = p * ((is_kept ? kModified ? dp * keep : dp : Real(0)) - delta);
    dp = kModified ? ds * cap_slope : ds;
    return ds;
}

// tile[column][row] = acc, whose rows are in blocks.
template <typename Real, int kRows, int kCols, typename TileP, int kY>
__device__ __forceinline__ void store_transposed(TileP &tile, const Real (&acc)[kRows][kCols], const Lanes<kY> &lane) {
    const int row = lane.template block_row<Real, kRows>();
#pragma unroll
    for (int j = 0; j < kCols; ++j)
#pragma unroll
        for (int i = 0; i < kRows; i += kVec<Real>) {
            Vec<Real> v;
#pragma unroll
            for (int c = 0; c < kVec<Real>; ++c) v.x[c] = acc[i + c][j];
            *reinterpret_cast<Vec<Real> *>(tile.row(lane.col(j)) + row + lane.template block_step<Real>(i)) = v;
        }
}

#endif
