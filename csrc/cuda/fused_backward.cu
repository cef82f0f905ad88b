// The fused backward: the workspace, the order of the kernels, and the gradients that belong to a head.
#include "cuda/fused_backward.cuh"

// d_sinks_h = -sum over the rows of head h of e^(sink - lse) delta, d_slope_h = -sum of dS |i + offset - j|: a block a head.
template <typename Real>
__global__ void __launch_bounds__(kThreads)
    fused_backward_heads(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    __shared__ double partial[kWarps];
    const fa_forward_args &forward = args.forward;
    const int64_t h = blockIdx.x, m_blocks = fa_ceil_div(forward.seqlen_q, kSlopeBlock);
    const bool wants_slopes = args.d_alibi_slopes.data != nullptr;
    const Real sink = args.d_sinks.data ? load_per_head<Real>(forward.sinks, 0, h) : Real(0);
    double d_sink = 0, d_slope = 0; // of this thread
    for (int64_t b = 0; b < forward.batch; ++b) {
        const fa_sequence seq = fa_sequence_at(&forward, b);
        const RowValues<Real> of_row = row_values<Real>(forward, seq, plan, b, h);
        for (int64_t row = threadIdx.x; args.d_sinks.data && row < seq.len_q; row += kThreads)
            d_sink -= static_cast<double>(exp_of(sink - of_row.lse[row] - of_row.correction[row])) *
                      static_cast<double>(of_row.delta[row]);
        for (int64_t m = threadIdx.x; wants_slopes && m < m_blocks; m += kThreads)
            d_slope -= plan.slope_sums[(b * forward.heads_q + h) * m_blocks + m];
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

fa_status fa_backward_heads(const fa_backward_args *args, const BackwardPlan &plan) {
    if (!args->d_alibi_slopes.data && !args->d_sinks.data) return FA_OK;
    const fa_forward_args *forward = &args->forward;
    const auto kernel = forward->dtype == FA_FLOAT64 ? fused_backward_heads<double> : fused_backward_heads<float>;
    return fa_launch("backward, the gradients of heads", kernel, forward->heads_q, kThreads, 0, fa_stream(forward), *args,
                     plan);
}

// Whether a row may see no key, as far as the host can tell (finite scores do not overflow).
static bool may_have_blind_rows(const fa_forward_args *args) {
    const bool lengths_known = !args->seqlens_q && !args->seqlens_k && !args->cu_seqlens_q;
    const bool by_position = args->causal || args->window_left >= 0 || args->window_right >= 0;
    const bool each_sees_itself = args->seqlen_q <= args->seqlen_k; // a window reaches the row's own position
    return args->bias.data || args->alibi_slopes.data || !lengths_known || args->seqlen_k == 0 ||
           (by_position && !each_sees_itself);
}

BackwardPlan fa_plan_backward(const fa_backward_args *args, fa_arena *arena) {
    const fa_forward_args *forward = &args->forward;
    const int64_t rows =
        forward->heads_q * (forward->cu_seqlens_q ? forward->total_q : forward->batch * forward->seqlen_q);
    const size_t row_bytes = static_cast<size_t>(rows * fa_dtype_bytes(fa_lse_dtype(forward)));
    const int64_t slopes = forward->batch * forward->heads_q * fa_ceil_div(forward->seqlen_q, kSlopeBlock);
    BackwardPlan plan = {};
    plan.lse = fa_take(arena, row_bytes);
    plan.correction = fa_take(arena, row_bytes);
    plan.delta = fa_take(arena, row_bytes);
    if (args->d_alibi_slopes.data)
        plan.slope_sums = static_cast<double *>(fa_take(arena, sizeof(double) * static_cast<size_t>(slopes)));
    plan.has_blind_rows = may_have_blind_rows(forward);
    fa_fused_plan_bias(args, &plan, arena);
    return plan;
}

size_t fa_cuda_fused_backward_bytes(const fa_backward_args *args) {
    fa_arena arena = {nullptr, 0};
    fa_plan_backward(args, &arena);
    return arena.used_bytes;
}

fa_status fa_cuda_fused_backward(const fa_backward_args *args) {
    const fa_forward_args *forward = &args->forward;
    fa_arena arena = {static_cast<char *>(forward->workspace), 0};
    const BackwardPlan plan = fa_plan_backward(args, &arena);
    FA_CHECK(fa_fused_backward_rows(args, plan));
    FA_CHECK(fa_fused_backward_kv(args, plan));
    FA_CHECK(fa_fused_backward_q(args, plan));
    if (args->d_bias.data) FA_CHECK(fa_fused_backward_bias(args, plan));
    return fa_backward_heads(args, plan);
}
