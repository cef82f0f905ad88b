// The gradients that belong to a head: d_alibi_slopes, d_sinks.
#include "cuda/backward.cuh"

// d_sinks_h = -sum over the rows of head h of e^(sink - lse) delta, d_slope_h = -sum of dS |i + offset - j|: a block a head.
template <typename Real>
__global__ void __launch_bounds__(kThreads)
    backward_heads(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    __shared__ double partial[kWarps];
    const fa_forward_args &forward = args.forward;
    const int64_t h = blockIdx.x;
    const bool wants_slopes = args.d_alibi_slopes.data != nullptr;
    const Real sink = forward.sinks.data ? load_per_head<Real>(forward.sinks, 0, h) : -infinity(Real());
    double d_sink = 0, d_slope = 0; // of this thread
    for (int64_t b = 0; b < forward.batch; ++b) {
        const fa_sequence seq = fa_sequence_at(&forward, b);
        const RowValues<Real> of_row = row_values<Real>(forward, seq, plan, b, h);
        const auto sink_times_delta = [&](int64_t row) { // P of the sink
            return static_cast<double>(exp_of(sink - of_row.lse[row] - of_row.correction_at(row))) *
                   static_cast<double>(of_row.delta[row]);
        };
        for (int64_t row = threadIdx.x; args.d_sinks.data && row < seq.len_q; row += kThreads)
            d_sink -= sink_times_delta(row);
        for (int64_t part = threadIdx.x; wants_slopes && part < plan.slope_parts; part += kThreads)
            d_slope -= plan.slope_sums[(b * forward.heads_q + h) * plan.slope_parts + part];
        // The sum of a row's dS is d_lse + P_sink delta.
        const int64_t before = wants_slopes && plan.slopes_have_origin ? seq.len_q - seq.len_k : 0;
        for (int64_t row = threadIdx.x; row < fa_min(before, seq.len_q); row += kThreads) {
            if (of_row.lse[row] == infinity(Real())) continue;
            double sum = sink_times_delta(row);
            if (args.d_lse.data)
                sum += load<double>(args.d_lse.data, fa_lse_dtype(&forward),
                                    fa_row_offset(&args.d_lse, seq.batch_index, h, seq.row_q + row));
            d_slope -= static_cast<double>(slope_origin(static_cast<float>(row - before))) * sum;
        }
        if (wants_slopes && (args.d_alibi_slopes.stride_b || b == forward.batch - 1)) {
            const double sum = block_sum(d_slope, partial);
            if (threadIdx.x == 0)
                store(args.d_alibi_slopes.data, args.d_alibi_slopes.dtype,
                      b * args.d_alibi_slopes.stride_b + h * args.d_alibi_slopes.stride_h, sum);
            d_slope = 0;
            __syncthreads(); // the sum was read
        }
    }
    if (args.d_sinks.data) {
        const double sum = block_sum(d_sink, partial);
        if (threadIdx.x == 0) store(args.d_sinks.data, args.d_sinks.dtype, h * args.d_sinks.stride_h, sum);
    }
    if (forward.batch == 0 && wants_slopes && !args.d_alibi_slopes.stride_b && threadIdx.x == 0)
        store(args.d_alibi_slopes.data, args.d_alibi_slopes.dtype, h * args.d_alibi_slopes.stride_h, 0.0);
}

void fa_plan_backward_heads(const fa_backward_args *args, int64_t slope_parts, BackwardPlan *plan, fa_arena *arena) {
    plan->slope_parts = slope_parts;
    if (args->d_alibi_slopes.data)
        plan->slope_sums = static_cast<double *>(fa_take(
            arena, sizeof(double) * static_cast<size_t>(args->forward.batch * args->forward.heads_q * slope_parts)));
}

fa_status fa_backward_heads(const fa_backward_args *args, const BackwardPlan &plan) {
    if (!args->d_alibi_slopes.data && !args->d_sinks.data) return FA_OK;
    const auto kernel = args->forward.dtype == FA_FLOAT64 ? backward_heads<double> : backward_heads<float>;
    return fa_launch("backward, the gradients of heads", kernel, args->forward.heads_q, kThreads, 0,
                     fa_stream(&args->forward), *args, plan);
}
