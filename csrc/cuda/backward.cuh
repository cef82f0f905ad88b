// What the backwards on the GPU share: values of a row of q, the workspace, and the kernels that are the same in all.
//
//   delta = rowsum(dO o O) - d_lse,   P = e^(S - lse),   dP = dO V^T,   dS = P o (dP - delta)
//   dV = P^T dO,   dK = scale dS^T Q,   dQ = scale dS K                   Dao, FlashAttention-2 (2023), algorithm 2
//
//   backward_rows.cu          delta and lse, once a row
//   backward_correction.cu    what rounding took from a float32 lse
//   backward_heads.cu         d_alibi_slopes, d_sinks: a block owns a head
//   backward_bias.cu          the sum of d_bias over its chunks, and how many there are
#ifndef FA_BACKWARD_CUH
#define FA_BACKWARD_CUH

#include "cuda/scores.cuh"

constexpr float kExactLse = 64, kExactLse16 = 4096; // a larger |lse| is corrected: of float32 inputs, of 16-bit ones

// One value for each row of q, [batch][heads_q][seqlen_q] or, packed, [heads_q][total_q]. Where a row has neither
// key nor sink lse is +inf, so that P = 0, and delta is 0. P = e^(S - lse - correction), see backward_correction.cu.
template <typename Real>
struct RowValues {
    Real *lse, *correction, *delta; // correction NULL: 0
    __device__ __forceinline__ Real correction_at(int64_t row) const { return correction ? correction[row] : Real(0); }
};

struct BackwardPlan {
    void *lse, *correction, *delta; // as RowValues
    double *slope_sums;             // [batch][heads_q][slope_parts] of dS |i + offset - j|; NULL: not wanted
    int64_t slope_parts;
    bool slopes_have_origin; // slope_sums are of dS (|i + offset - j| - slope_origin(i + offset))
    double *bias_sums;       // [bias_chunks][elements of d_bias]; NULL: one chunk holds all, or d_bias is not wanted
    int64_t bias_chunks;
    int32_t *semaphores; // [semaphore_count], 0 after fa_backward_rows unless q has no rows; NULL: none
    int64_t semaphore_count;
    int32_t
        *has_far_rows;   // one of the semaphores: 1 if a row's |lse| is so large that it is corrected; NULL: not asked
    bool has_blind_rows; // rows with neither key nor sink are possible: their d_o, which may be anything, is taken as 0
};

template <typename Real>
__device__ __forceinline__ RowValues<Real> row_values(const fa_forward_args &args, const fa_sequence &seq,
                                                      const BackwardPlan &plan, int64_t b, int64_t h) {
    const int64_t at = args.cu_seqlens_q ? h * args.total_q + seq.row_q : (b * args.heads_q + h) * args.seqlen_q;
    return {static_cast<Real *>(plan.lse) + at, plan.correction ? static_cast<Real *>(plan.correction) + at : nullptr,
            static_cast<Real *>(plan.delta) + at};
}

// Of a row before the first key: its distance to that. Each dS of the row is off by a share of what o was rounded by, times the
// distance; what all distances share is better multiplied by the sum over the row, which is known.
__device__ __forceinline__ float slope_origin(float position) { return fmaxf(-position, 0.0f); }

// What load_tile and TileCopy ask about rows of d_o.
template <typename Real>
__device__ __forceinline__ const Real *blind_rows(const BackwardPlan &plan, const RowValues<Real> &of_row) {
    return plan.has_blind_rows ? of_row.lse : nullptr;
}

// The sum over the block's threads, in thread 0, in a fixed order. partial: shared, one for each warp.
__device__ __forceinline__ double block_sum(double x, double (&partial)[kWarps]) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_down_sync(~0u, x, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads(); // every warp's sum is there
    return partial[0] + partial[1] + partial[2] + partial[3];
}

// Sets lse, correction, delta and has_blind_rows; bias_sums and bias_chunks. A plan begins as zeros.
void fa_plan_backward_rows(const fa_backward_args *args, BackwardPlan *plan, fa_arena *arena);
void fa_plan_backward_bias(const fa_backward_args *args, BackwardPlan *plan, fa_arena *arena);
void fa_plan_backward_heads(const fa_backward_args *args, int64_t slope_parts, BackwardPlan *plan, fa_arena *arena);

// Writes lse, correction and delta; clears the semaphores.
fa_status fa_backward_rows(const fa_backward_args *args, const BackwardPlan &plan);
fa_status fa_backward_correction(const fa_backward_args *args, const BackwardPlan &plan); // as a part of it
fa_status fa_backward_heads(const fa_backward_args *args, const BackwardPlan &plan);      // d_alibi_slopes, d_sinks
// d_bias = the sum of bias_sums, where there are more chunks than one.
fa_status fa_backward_add_bias_chunks(const fa_backward_args *args, const BackwardPlan &plan);
// float16 and bfloat16, rows of whole 16 bytes, head_dim up to kMaxTensorCoreDim.
fa_status fa_tensor_core_backward_bias(const fa_backward_args *args, const BackwardPlan &plan);

#endif
