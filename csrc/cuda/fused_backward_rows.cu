// Once a row: delta = rowsum(dO o O) - d_lse, and what lse lost to rounding.
#include "cuda/fused_backward.cuh"

enum { kTileRows = 4, kTileCols = 8, kBlockM = 64, kBlockN = 64 }; // of S, where it is needed

// Rows of a larger |lse| are summed again: a float32 lse, and so P, is off by up to 2^-24 |lse|.
constexpr float kExactLse = 64;

// correction = ln sum e^(S - lse), over the keys of a row and its sink. lse: of the tile's rows, in `of_row`.
template <typename Real>
__device__ void sum_rows_again(const fa_forward_args &args, const fa_sequence &seq, int64_t b, int64_t h, int64_t row0,
                               int64_t row_end, const RowValues<Real> &of_row, Chunks<Real, kBlockM, kBlockN> &chunks) {
    const int64_t h_kv = h / (args.heads_q / args.heads_kv);
    const fa_interval first = fa_visible_keys(&args, &seq, row0), last = fa_visible_keys(&args, &seq, row_end - 1);
    const Rows<Real> q(args.q, args.dtype, seq.batch_index, h, seq.row_q, args.head_dim);
    const Rows<Real> k(args.k, args.dtype, seq.batch_index, h_kv, seq.row_k, args.head_dim);
    const ScoreRule<Real> rule(args, seq, b, h);
    const Real scale = static_cast<Real>(args.softmax_scale);
    const Lanes<4> lane;
    Real sum[kTileRows] = {};
    for (int64_t n0 = first.lo / kBlockN * kBlockN; n0 < last.hi; n0 += kBlockN) {
        Real acc_s[kTileRows][kTileCols] = {};
        multiply_chunks<false>(acc_s, chunks, q, row0, row_end, k, n0, seq.len_k, lane);
#pragma unroll
        for (int i = 0; i < kTileRows; ++i) {
            const int64_t row = row0 + lane.row<kTileRows>(i), col0 = n0 + lane.x;
            const Real lse = row < row_end ? of_row.lse[row] : infinity(Real());
            const Span keys = span_of(args, seq, row, col0, false);
#pragma unroll
            for (int j = 0; j < kTileCols; ++j)
                sum[i] +=
                    exp_of(score_of<true>(rule, product(acc_s[i][j], scale), row, col0, lane.kLanesX * j, keys) - lse);
        }
    }
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
        const int64_t row = row0 + lane.row<kTileRows>(i);
        Real total = row_sum_of<lane.kLanesX>(sum[i]);
        if (row >= row_end || lane.x != 0) continue;
        if (args.sinks.data) total += exp_of(load_per_head<Real>(args.sinks, 0, h) - of_row.lse[row]);
        of_row.correction[row] = total > 0 ? log_of(total) : 0;
    }
}

template <typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    fused_backward_rows(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    __shared__ Chunks<Real, kBlockM, kBlockN> chunks;
    const fa_forward_args &forward = args.forward;
    const fa_place place = fa_place_of(blockIdx.x, forward.heads_q, fa_ceil_div(forward.seqlen_q, kBlockM));
    const int64_t b = place.b, h = place.head, row0 = place.part * kBlockM;
    const fa_sequence seq = fa_sequence_at(&forward, b);
    if (row0 >= seq.len_q) return;
    const int64_t row_end = fa_min(row0 + kBlockM, seq.len_q);
    const RowValues<Real> of_row = row_values<Real>(forward, seq, plan, b, h);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    bool is_inexact = false;
    for (int64_t row = row0 + warp; row < row_end; row += kWarps) { // a warp a row
        const int64_t lse_at = fa_row_offset(&forward.lse, seq.batch_index, h, seq.row_q + row);
        const Real lse = load<Real>(forward.lse.data, fa_lse_dtype(&forward), lse_at);
        const bool sees_keys = lse != -infinity(Real()); // else d_o may be anything
        const int64_t o_at = fa_row_offset(&forward.o, seq.batch_index, h, seq.row_q + row);
        const int64_t d_o_at = fa_row_offset(&args.d_o, seq.batch_index, h, seq.row_q + row);
        Real sum = 0;
        for (int64_t d = lane; sees_keys && d < forward.head_dim_v; d += 32)
            sum += load<Real>(forward.o.data, forward.dtype, o_at + d) *
                   load<Real>(args.d_o.data, forward.dtype, d_o_at + d);
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (sees_keys && args.d_lse.data)
            sum -= load<Real>(args.d_lse.data, fa_lse_dtype(&forward),
                              fa_row_offset(&args.d_lse, seq.batch_index, h, seq.row_q + row));
        if (lane == 0) {
            of_row.lse[row] = sees_keys ? lse : infinity(Real());
            of_row.correction[row] = 0;
            of_row.delta[row] = sum;
        }
        is_inexact |= sizeof(Real) == 4 && sees_keys && fabs(lse) > kExactLse;
    }
    if (__syncthreads_or(is_inexact)) // and the rows' lse are there
        sum_rows_again(forward, seq, b, h, row0, row_end, of_row, chunks);
}

template <typename Real>
static fa_status launch(const fa_backward_args *args, const BackwardPlan &plan) {
    const fa_forward_args *forward = &args->forward;
    const int64_t blocks = fa_ceil_div(forward->seqlen_q, kBlockM) * forward->heads_q * forward->batch;
    return fa_launch("fused backward, delta", fused_backward_rows<Real>, blocks, kThreads, 0, fa_stream(forward), *args,
                     plan);
}

fa_status fa_fused_backward_rows(const fa_backward_args *args, const BackwardPlan &plan) {
    return args->forward.dtype == FA_FLOAT64 ? launch<double>(args, plan) : launch<float>(args, plan);
}
