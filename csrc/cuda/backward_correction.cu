// What a row's lse lost to rounding: correction = ln of the row's sum of e^(S - lse), which would be 0.
//
// A float32 lse, and so P = e^(S - lse), is off by up to 2^-24 |lse|: where |lse| is large, by more than anything else in
// the arithmetic on float32 inputs, and where it is very large, by more than 16-bit ones are rounded. A float64 lse is
// exact enough.
#include "cuda/backward.cuh"

enum { kTileRows = 4, kTileCols = 8, kBlockM = 64, kBlockN = 64 }; // of S, where it is needed

// correction = ln sum e^(S - lse), over the keys of a row and its sink. of_row: holds lse.
__device__ void sum_rows_again(const fa_forward_args &args, const fa_sequence &seq, int64_t b, int64_t h, int64_t row0,
                               int64_t row_end, const RowValues<float> &of_row,
                               Chunks<float, kBlockM, kBlockN> &chunks) {
    const int64_t h_kv = h / (args.heads_q / args.heads_kv);
    const fa_interval first = fa_visible_keys(&args, &seq, row0), last = fa_visible_keys(&args, &seq, row_end - 1);
    const Rows<float> q(args.q, args.dtype, seq.batch_index, h, seq.row_q, args.head_dim);
    const Rows<float> k(args.k, args.dtype, seq.batch_index, h_kv, seq.row_k, args.head_dim);
    const ScoreRule<float> rule(args, seq, b, h);
    const float scale = static_cast<float>(args.softmax_scale);
    const Lanes<4> lane;
    float sum[kTileRows] = {};
    for (int64_t n0 = first.lo / kBlockN * kBlockN; n0 < last.hi; n0 += kBlockN) {
        float acc_s[kTileRows][kTileCols] = {};
        multiply_chunks<false>(acc_s, chunks, q, row0, row_end, k, n0, seq.len_k, lane);
#pragma unroll
        for (int i = 0; i < kTileRows; ++i) {
            const int64_t row = row0 + lane.row<kTileRows>(i), col0 = n0 + lane.x;
            const float lse = row < row_end ? of_row.lse[row] : infinity(0.0f);
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
        float total = row_sum_of<lane.kLanesX>(sum[i]);
        if (row >= row_end || lane.x != 0) continue;
        if (args.sinks.data) total += exp_of(load_per_head<float>(args.sinks, 0, h) - of_row.lse[row]);
        of_row.correction[row] = total > 0 ? log_of(total) : 0;
    }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    backward_correction(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    __shared__ Chunks<float, kBlockM, kBlockN> chunks;
    const fa_forward_args &forward = args.forward;
    const fa_place place = fa_place_of(blockIdx.x, forward.heads_q, fa_ceil_div(forward.seqlen_q, kBlockM));
    const int64_t b = place.b, h = place.head, row0 = place.part * kBlockM;
    const fa_sequence seq = fa_sequence_at(&forward, b);
    if (row0 >= seq.len_q) return;
    const int64_t row_end = fa_min(row0 + kBlockM, seq.len_q), row = row0 + threadIdx.x;
    const RowValues<float> of_row = row_values<float>(forward, seq, plan, b, h);

    bool is_inexact = false;
    if (threadIdx.x < kBlockM && row < row_end) {
        const float lse = of_row.lse[row];
        is_inexact = lse != infinity(0.0f) && fabsf(lse) > (forward.dtype == FA_FLOAT32 ? kExactLse : kExactLse16);
        of_row.correction[row] = 0;
    }
    if (is_inexact && plan.has_far_rows) *plan.has_far_rows = 1;
    if (__syncthreads_or(is_inexact)) // and the zeros are there, which the sums replace
        sum_rows_again(forward, seq, b, h, row0, row_end, of_row, chunks);
}

fa_status fa_backward_correction(const fa_backward_args *args, const BackwardPlan &plan) {
    const fa_forward_args *forward = &args->forward;
    const int64_t blocks = fa_ceil_div(forward->seqlen_q, kBlockM) * forward->heads_q * forward->batch;
    return fa_launch("backward, correction of lse", backward_correction, blocks, kThreads, 0, fa_stream(forward), *args,
                     plan);
}
