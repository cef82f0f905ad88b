// What the kernels of the fused backward share.
//
//   delta = rowsum(dO o O) - d_lse,   P = e^(S - lse),   dP = dO V^T,   dS = P o (dP - delta)
//   dV = P^T dO,   dK = scale dS^T Q,   dQ = scale dS K                   Dao, FlashAttention-2 (2023), algorithm 2
//
//   fused_backward_rows.cu    delta, and what rounding took from lse, once a row
//   fused_backward_kv.cu      dK, dV: a block owns keys and walks over the queries of its group of heads
//   fused_backward_q.cu       dQ, and what d_alibi_slopes is the sum of: a block owns queries and walks over keys
//   fused_backward_bias.cu    d_bias: a block owns a tile of the bias and walks over what it broadcasts to
//   fused_backward.cu         d_alibi_slopes, d_sinks: a block owns a head; the plan, and the order of all these
//
// Each gradient is summed by one thread in one order: no atomics, the same bits on every run. The price is that S and dP
// are computed twice, seven products instead of five.
#ifndef FA_FUSED_BACKWARD_CUH
#define FA_FUSED_BACKWARD_CUH

#include "cuda/scores.cuh"

// One value for each row of q, [batch][heads_q][seqlen_q] or, packed, [heads_q][total_q]. Where a row has neither
// key nor sink lse is +inf, so that P = 0, and delta is 0. P = e^(S - lse - correction): a large lse is rounded by more than P may be,
// and the correction, the logarithm of the sum of such a row's e^(S - lse), makes up for it.
template <typename Real>
struct RowValues {
    Real *lse, *correction, *delta;
};

enum { kSlopeBlock = 64 }; // queries behind an element of slope_sums: a tile of the dQ kernel

struct BackwardPlan {
    void *lse, *correction, *delta; // as RowValues
    double *slope_sums;             // [batch][heads_q][seqlen_q / kSlopeBlock] of dS |i + offset - j|; NULL: not wanted
    double *bias_sums; // [bias_chunks][elements of d_bias]; NULL: one chunk holds all, or d_bias is not wanted
    int64_t bias_chunks;
    bool has_blind_rows; // rows with neither key nor sink are possible: their d_o, which may be anything, is taken as 0
};

template <typename Real>
__device__ __forceinline__ RowValues<Real> row_values(const fa_forward_args &args, const fa_sequence &seq,
                                                      const BackwardPlan &plan, int64_t b, int64_t h) {
    const int64_t at = args.cu_seqlens_q ? h * args.total_q + seq.row_q : (b * args.heads_q + h) * args.seqlen_q;
    return {static_cast<Real *>(plan.lse) + at, static_cast<Real *>(plan.correction) + at,
            static_cast<Real *>(plan.delta) + at};
}

// What load_tile asks about rows of d_o.
template <typename Real>
__device__ __forceinline__ const Real *blind_rows(const BackwardPlan &plan, const RowValues<Real> &of_row) {
    return plan.has_blind_rows ? of_row.lse : nullptr;
}

// arena->base NULL: only counts.
BackwardPlan fa_plan_backward(const fa_backward_args *args, fa_arena *arena);
fa_status fa_backward_heads(const fa_backward_args *args, const BackwardPlan &plan);
fa_status fa_fused_backward_rows(const fa_backward_args *args, const BackwardPlan &plan);
fa_status fa_fused_backward_kv(const fa_backward_args *args, const BackwardPlan &plan);
fa_status fa_fused_backward_q(const fa_backward_args *args, const BackwardPlan &plan);
fa_status fa_fused_backward_bias(const fa_backward_args *args, const BackwardPlan &plan);
// Sets bias_sums and bias_chunks.
void fa_fused_plan_bias(const fa_backward_args *args, BackwardPlan *plan, fa_arena *arena);

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

// The sum over the block's threads, in thread 0, in a fixed order. partial: shared, one for each warp.
__device__ __forceinline__ double block_sum(double x, double (&partial)[kWarps]) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_down_sync(~0u, x, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads(); // every warp's sum is there
    return partial[0] + partial[1] + partial[2] + partial[3];
}

#endif
