// The fused backward: the workspace, and the order of the kernels.
#include "cuda/fused_backward.cuh"

// base NULL: only counts.
static BackwardPlan plan_of(const fa_backward_args *args, void *base, size_t *bytes) {
    fa_arena arena = {static_cast<char *>(base), 0};
    BackwardPlan plan = {};
    fa_plan_backward_rows(args, &plan, &arena);
    fa_plan_backward_heads(args, fa_ceil_div(args->forward.seqlen_q, kSlopeBlock), &plan, &arena);
    fa_plan_backward_bias(args, &plan, &arena);
    *bytes = arena.used_bytes;
    return plan;
}

size_t fa_cuda_fused_backward_bytes(const fa_backward_args *args) {
    size_t bytes = 0;
    plan_of(args, nullptr, &bytes);
    return bytes;
}

fa_status fa_cuda_fused_backward(const fa_backward_args *args) {
    const fa_forward_args *forward = &args->forward;
    size_t bytes = 0;
    const BackwardPlan plan = plan_of(args, forward->workspace, &bytes);
    FA_CHECK(fa_backward_rows(args, plan));
    FA_CHECK(fa_fused_backward_kv(args, plan));
    FA_CHECK(fa_fused_backward_q(args, plan));
    if (args->d_bias.data) FA_CHECK(fa_fused_backward_bias(args, plan));
    return fa_backward_heads(args, plan);
}
