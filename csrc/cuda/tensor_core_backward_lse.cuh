// The beginning of the backward on tensor cores in float32: what rounding took from lse.
#ifndef FA_TENSOR_CORE_BACKWARD_LSE_CUH
#define FA_TENSOR_CORE_BACKWARD_LSE_CUH

#include "cuda/tensor_core_backward_tile.cuh"

// Float32: what backward_correction.cu has summed, again, of the scores that the backward makes. Those of other products
// differ by the rounding of a large S, which here cancels: each row of P adds up to 1.
template <typename T>
struct CorrectionSmem {
    static constexpr int kBlockN = T::kWarps * T::kWarpKeys;
    SwizzledTile<float, kBlockN, T::kDim> k;
    SwizzledTile<float, T::kBlockM, T::kDim> q;
    float sums[T::kWarps][T::kBlockM];
    MmaScoreRule rule;
};
template <typename T, unsigned kFeatures>
__global__ void __launch_bounds__(T::kThreads)
    tensor_core_correct_lse(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan,
                            const __grid_constant__ MmaScorePlan scores) {
    using M = Mma<float>;
    using Smem = CorrectionSmem<T>;
    constexpr int kMTiles = T::kMTiles, kNTiles = T::kBlockM / 8;
    extern __shared__ __align__(1024) unsigned char shared[];
    Smem &smem = *reinterpret_cast<Smem *>(shared);

    const fa_forward_args &forward = args.forward;
    const fa_place place = fa_place_of(blockIdx.x, forward.heads_q, fa_ceil_div(forward.seqlen_q, T::kBlockM));
    const int64_t b = place.b, h = place.head, h_kv = h / (forward.heads_q / forward.heads_kv);
    const fa_sequence seq = fa_sequence_at(&forward, b);
    const int row0 = static_cast<int>(place.part * T::kBlockM), len_k = static_cast<int>(seq.len_k);
    if (row0 >= seq.len_q) return;
    const int row_end = static_cast<int>(fa_min(row0 + T::kBlockM, seq.len_q));
    const RowValues<float> of_row = row_values<float>(forward, seq, plan, b, h);
    const int own_row = row0 + static_cast<int>(threadIdx.x); // of the first threads
    const bool has_row = threadIdx.x < T::kBlockM && own_row < row_end;
    const float own_lse = has_row ? of_row.lse[own_row] : infinity(0.0f);
    const bool is_inexact =
        own_lse != infinity(0.0f) && (fabsf(own_lse) > kExactLse || of_row.correction[own_row] != 0);
    if (!__syncthreads_or(is_inexact)) return;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Rows<float> q(forward.q, FA_FLOAT32, seq.batch_index, h, seq.row_q, forward.head_dim);
    const Rows<float> k(forward.k, FA_FLOAT32, seq.batch_index, h_kv, seq.row_k, forward.head_dim);
    const fa_interval first = fa_visible_keys(&forward, &seq, row0),
                      last = fa_visible_keys(&forward, &seq, row_end - 1);
    constexpr bool kModified = kFeatures != kProducts;
    const float natural = kModified ? scores.unit : static_cast<float>(forward.softmax_scale); // a score of 1
    if constexpr (kModified) {
        if (threadIdx.x == 0) smem.rule = MmaScoreRule(forward, seq, b, h);
        __syncthreads(); // the rule is there
    }
    TileCopy<T::kThreads, decltype(smem.q)>(q.data, forward.q.stride_l, forward.head_dim, row0, row_end).all(smem.q);
    float lse[kNTiles][2], sum[kNTiles][2] = {};
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = row0 + 8 * j + lane % 4 * 2 + e;
            lse[j][e] = row < row_end ? of_row.lse[row] : infinity(0.0f);
        }
    for (int n0 = static_cast<int>(first.lo) / Smem::kBlockN * Smem::kBlockN; n0 < last.hi; n0 += Smem::kBlockN) {
        TileCopy<T::kThreads, decltype(smem.k)>(k.data, forward.k.stride_l, forward.head_dim, n0, len_k).all(smem.k);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads(); // Q and K are there
        float acc_s[kMTiles][kNTiles][4] = {};
        multiply_rows<T::kDim>(acc_s, M::place_a(smem.k, warp * T::kWarpKeys), M::place_b(smem.q), [](int) {});
        const int thread_query = row0 + lane % 4 * 2, thread_key = n0 + warp * T::kWarpKeys + lane / 4;
        if constexpr (kModified)
            modify_scores<kFeatures, float, true>(
                acc_s, forward, seq, scores, smem.rule, thread_query, thread_key, [](int, int, int, float) {},
                StagedBias<typename T::BiasTile>{});
        hide_scores<true>(acc_s, forward, seq, thread_query, thread_key);
        each_entry<true, kMTiles, kNTiles>([&](int, int, int i, int j, int entry) {
            sum[j][entry % 2] += exp_of(product(acc_s[i][j][entry], natural) - lse[j][entry % 2]);
        });
        __syncthreads(); // K was read
    }
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            for (int step = 4; step < 32; step *= 2) sum[j][e] += __shfl_xor_sync(~0u, sum[j][e], step);
            if (lane < 4) smem.sums[warp][8 * j + lane * 2 + e] = sum[j][e];
        }
    cp_async_commit();  // Q's, where no key was visible
    cp_async_wait<0>(); // no copy outlives its block
    __syncthreads();    // all warps' sums are there
    if (!has_row || own_lse == infinity(0.0f)) return;
    float total = 0;
    for (int w = 0; w < T::kWarps; ++w) total += smem.sums[w][threadIdx.x];
    if (forward.sinks.data) total += exp_of(load_per_head<float>(forward.sinks, 0, h) - own_lse);
    of_row.correction[own_row] = total > 0 ? log_of(total) : 0;
}

#endif
