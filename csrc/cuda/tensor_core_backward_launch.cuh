// The launch of the backward on tensor cores: its workspace, the order of its blocks, and the kernels before and after it.
#ifndef FA_TENSOR_CORE_BACKWARD_LAUNCH_CUH
#define FA_TENSOR_CORE_BACKWARD_LAUNCH_CUH

#include "cuda/fused_backward.cuh"
#include "cuda/launch.cuh"
#include "cuda/tensor_core_backward.cuh"
#include "cuda/tensor_core_backward_dq.cuh"
#include "cuda/tensor_core_backward_lse.cuh"

// bytes not NULL: only tells the workspace.
fa_status fa_tensor_core_backward_f32(const fa_backward_args *args, size_t *bytes);

constexpr int64_t kDqCacheBytes = 32 << 20; // Q, dO and dQ' of the heads that run together: of an H200's L2 cache

// base NULL: only counts.
template <typename T>
static BackwardPlan plan_of(const fa_backward_args *args, void *base, QueryGradient *dq, size_t *bytes) {
    const fa_forward_args *forward = &args->forward;
    fa_arena arena = {static_cast<char *>(base), 0};
    BackwardPlan plan = {};
    fa_plan_backward_rows(args, &plan, &arena);
    fa_plan_backward_heads(args, fa_ceil_div(forward->seqlen_k, T::kBlockN), &plan, &arena);
    plan.slopes_have_origin = true;
    fa_plan_backward_bias(args, &plan, &arena);
    dq->blocks = query_blocks<T::kBlockM>(*forward);
    dq->chains = fa_has_unequal_rows(forward) && forward->seqlen_k > 8 * T::kBlockN ? kMostChains : 1;
    const size_t blocks = static_cast<size_t>(forward->heads_q * dq->blocks);
    dq->sums = static_cast<float *>(fa_take(&arena, blocks * dq->chains * T::kBlockM * T::kDim * sizeof(float)));
    dq->turns = static_cast<int32_t *>(fa_take(&arena, (blocks * dq->chains + 1) * sizeof(int32_t)));
    plan.semaphores = dq->turns, plan.semaphore_count = static_cast<int64_t>(blocks) * dq->chains + 1;
    plan.has_far_rows = dq->turns + blocks * dq->chains;
    *bytes = arena.used_bytes;
    return plan;
}

template <typename T>
static BackwardOrder order_of(const fa_forward_args &args, bool stores_d_bias) {
    const int64_t heads = args.heads_kv * args.batch, group = args.heads_q / fa_max(args.heads_kv, 1);
    const int64_t n_blocks = fa_ceil_div(args.seqlen_k, T::kBlockN);
    int device = 0, sms = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    int64_t most = fa_ceil_div(sms * T::kBlocksPerSm, fa_clamp(n_blocks, 1, 4));
    if (T::kHalves == 2 && !fa_has_unequal_rows(&args)) {
        // 64 keys a block add to dQ' twice as often: it is to stay in the L2 cache
        const int64_t row_bytes = T::kDim * static_cast<int64_t>(sizeof(float) + 2 * sizeof(typename T::Element));
        most = fa_clamp(kDqCacheBytes / fa_max(group * args.seqlen_q * row_bytes, 1), 1, most);
    }
    const int64_t section = fa_ceil_div(heads, fa_max(fa_ceil_div(heads, most), 1)); // alike
    return {static_cast<unsigned>(section),  static_cast<unsigned>(n_blocks), static_cast<int>(heads),
            static_cast<int>(args.heads_kv), static_cast<int>(group),         stores_d_bias};
}

// Whether there may be blocks of scores where no row sees a key: no turn meets them.
static inline bool leaves_blocks_out(const fa_forward_args &args) {
    return fa_has_unequal_rows(&args) || args.seqlens_q || args.seqlens_k;
}

// Whether dS can be stored as d_bias where it is made: no axis is summed, and where turns leave blocks out there are zeros
// first. It is rounded as dK and dQ take it: P once, dS once.
static inline bool can_store_d_bias(const fa_backward_args &args) {
    const fa_bias &t = args.d_bias;
    const fa_forward_args &forward = args.forward;
    const int64_t sizes[3] = {forward.seqlen_q, forward.heads_q, forward.batch};
    const int64_t strides[3] = {t.stride_q, t.stride_h, t.stride_b};
    int64_t dense = forward.seqlen_k;
    bool is_summed = false, is_dense = true;
    for (int axis = 0; axis < 3; dense *= sizes[axis++])
        if (sizes[axis] > 1) {
            is_summed |= strides[axis] == 0;
            is_dense &= strides[axis] == dense;
        }
    return has_whole_rows(t, forward.dtype) && !is_summed && forward.seqlen_k % 8 == 0 &&
           (is_dense || !leaves_blocks_out(forward));
}

static fa_status clear(void *at, int64_t bytes, cudaStream_t stream) {
    FA_REQUIRE(bytes == 0 || cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream) == cudaSuccess, FA_ERROR_DEVICE,
               "tensor core backward: %s", cudaGetErrorString(cudaGetLastError()));
    return FA_OK;
}

template <typename T, unsigned kFeatures>
static fa_status launch(const fa_backward_args *args) {
    const fa_forward_args *forward = &args->forward;
    const cudaStream_t stream = fa_stream(forward);
    const MmaScorePlan scores(*forward);
    QueryGradient dq;
    size_t bytes;
    const BackwardPlan plan = plan_of<T>(args, forward->workspace, &dq, &bytes);
    const bool stores_d_bias = kFeatures == kBias && can_store_d_bias(*args);
    const BackwardOrder order = order_of<T>(*forward, stores_d_bias);
    const int64_t row_blocks = fa_ceil_div(forward->seqlen_q, T::kBlockM) * forward->heads_q * forward->batch;
    FA_CHECK(fa_backward_rows(args, plan));
    if (T::kFloat && args->d_bias.data)
        FA_CHECK(fa_fused_backward_bias(args, plan)); // by the scores that lse was corrected by
    if constexpr (T::kFloat) {
        const auto kernel = tensor_core_correct_lse<T, kFeatures>;
        fa_allow_shared(reinterpret_cast<const void *>(kernel), sizeof(CorrectionSmem<T>)); // less than the backward's
        FA_CHECK(fa_launch("tensor core backward, correction of lse", kernel, row_blocks, T::kThreads,
                           sizeof(CorrectionSmem<T>), stream, *args, plan, scores));
    }
    if (plan.slope_sums) // of keys that no row sees, too
        FA_CHECK(clear(plan.slope_sums,
                       forward->batch * forward->heads_q * plan.slope_parts * static_cast<int64_t>(sizeof(double)),
                       stream));
    if (stores_d_bias && leaves_blocks_out(*forward))
        FA_CHECK(clear(args->d_bias.data,
                       forward->batch * forward->heads_q * forward->seqlen_q * forward->seqlen_k *
                           static_cast<int64_t>(sizeof(typename T::Element)),
                       stream));
    FA_CHECK(fa_launch("tensor core backward", tensor_core_backward<T, kFeatures>,
                       fa_ceil_div(forward->seqlen_k, T::kBlockN) * forward->heads_kv * forward->batch, T::kThreads,
                       sizeof(typename T::template Smem<kFeatures>), stream, *args, plan, dq, order, scores));
    FA_CHECK(
        fa_launch("tensor core backward, dQ", tensor_core_round_dq<T>, row_blocks, T::kThreads, 0, stream, *args, dq));
    if (!T::kFloat && args->d_bias.data && !stores_d_bias) FA_CHECK(fa_tensor_core_backward_bias(args, plan));
    return fa_backward_heads(args, plan);
}

// Launches a tile that holds the rows and that the device has the shared memory for, or tells its workspace; false: neither.
template <typename T, unsigned kFeatures>
static bool try_tile(const fa_backward_args *args, fa_status *status, size_t *bytes) {
    if (fa_max(args->forward.head_dim, args->forward.head_dim_v) > T::kDim) return false;
    const void *kernel = reinterpret_cast<const void *>(tensor_core_backward<T, kFeatures>);
    if (!fa_allow_shared(kernel, sizeof(typename T::template Smem<kFeatures>))) return false;
    QueryGradient dq;
    if (bytes)
        plan_of<T>(args, nullptr, &dq, bytes);
    else
        *status = launch<T, kFeatures>(args);
    return true;
}

#endif
