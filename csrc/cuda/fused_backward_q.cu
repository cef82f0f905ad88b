// dQ and d_alibi_slopes: a block owns kBlockM rows of one query head and walks over the keys that they see.
//
//   load Q, dO, V, row values | load K | S = Q K^T, dP = dO V^T | load next V ...
//                                                               | dS in registers | dS -> smem | dQ += dS K | load K | ...
#include <type_traits>

#include "cuda/fused_backward.cuh"

// kRows x kCols entries of S and of dP, and kRows x kDim / 8 of dQ, a thread.
// kWide: rows of any head_dim; they pass in chunks, and the block makes one slice of kDim columns of dQ.
template <typename Real_, int kDim_, int kRows_, int kCols_, bool kWide_>
struct QueryTile {
    using Real = Real_;
    static constexpr int kDim = kDim_, kRows = kRows_, kCols = kCols_, kOutputs = kDim / kLanesX;
    static constexpr int kBlockM = kWarps * kLanesY * kRows, kBlockN = kLanesX * kCols;
    static constexpr bool kWide = kWide_;
    struct WholeRows {
        Tile<Real, kBlockM, kDim> q, d_o;
        Tile<Real, kBlockN, kDim> v;
    };
    struct Smem {
        std::conditional_t<kWide, Chunks<Real, kBlockM, kBlockN>, WholeRows> rows;
        Tile<Real, kBlockN, kDim> k;
        Tile<Real, kBlockM, kBlockN, true> ds;
        double partial[kWarps];
    };
};

template <typename T>
static __host__ __device__ int64_t slices_of(const fa_forward_args &args) {
    return T::kWide ? fa_ceil_div(args.head_dim, T::kDim) : 1;
}

template <typename T, bool kModified>
__global__ void __launch_bounds__(kThreads, 2)
    fused_backward_q(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    using Real = typename T::Real;
    constexpr int kRows = T::kRows, kCols = T::kCols, kOutputs = T::kOutputs;
    extern __shared__ __align__(16) unsigned char shared[];
    typename T::Smem &smem = *reinterpret_cast<typename T::Smem *>(shared);

    const fa_forward_args &forward = args.forward;
    const int64_t m_blocks = fa_ceil_div(forward.seqlen_q, T::kBlockM), slices = slices_of<T>(forward);
    const fa_place place = fa_place_of(blockIdx.x / slices, forward.heads_q, m_blocks);
    const int slice = static_cast<int>(blockIdx.x % slices), slice_col = slice * T::kDim;
    const int64_t b = place.b, h = place.head, h_kv = h / (forward.heads_q / forward.heads_kv);
    const int64_t m_block = m_blocks - 1 - place.part, row0 = m_block * T::kBlockM; // causal: the longest rows first
    const fa_sequence seq = fa_sequence_at(&forward, b);
    const bool wants_slopes = kModified && plan.slope_sums && slice == 0;
    double *slope_sum = plan.slope_sums + (b * forward.heads_q + h) * m_blocks + m_block;
    if (row0 >= seq.len_q) {
        if (wants_slopes && threadIdx.x == 0) *slope_sum = 0;
        return;
    }
    const int64_t row_end = fa_min(row0 + T::kBlockM, seq.len_q);
    const fa_interval first = fa_visible_keys(&forward, &seq, row0);
    const fa_interval last = fa_visible_keys(&forward, &seq, row_end - 1);
    const Rows<Real> q(forward.q, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim);
    const Rows<Real> k(forward.k, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim);
    const Rows<Real> v(forward.v, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim_v);
    const Rows<Real> d_o(args.d_o, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim_v);
    const ScoreRule<Real> rule(forward, seq, b, h);
    const Real scale = static_cast<Real>(forward.softmax_scale), keep = static_cast<Real>(1 / (1 - forward.dropout_p));
    const int depth = static_cast<int>(fa_round_up(forward.head_dim, kVec<Real>));
    const int depth_v = static_cast<int>(fa_round_up(forward.head_dim_v, kVec<Real>));
    const bool full = row_end - row0 == T::kBlockM;
    const Lane lane;
    const int64_t thread_row = row0 + lane.row<kRows>(0);

    const RowValues<Real> of_row = row_values<Real>(forward, seq, plan, b, h);
    Real lse[kRows], correction[kRows], delta[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int64_t row = thread_row + kLanesY * i;
        lse[i] = row < row_end ? of_row.lse[row] : infinity(Real());
        correction[i] = row < row_end ? of_row.correction[row] : 0;
        delta[i] = row < row_end ? of_row.delta[row] : 0;
    }
    Real acc_dq[kRows][kOutputs] = {};
    double slopes = 0; // of this thread's entries: dS |i + offset - j|
    if constexpr (!T::kWide) {
        load_tile(smem.rows.q, q, row0, row_end);
        load_tile(smem.rows.d_o, d_o, row0, row_end, 0, of_row.lse);
    }

    const int64_t first_key = first.lo / T::kBlockN * T::kBlockN;
    if constexpr (!T::kWide) load_tile(smem.rows.v, v, first_key, seq.len_k);
    for (int64_t n0 = first_key; n0 < last.hi; n0 += T::kBlockN) {
        load_tile(smem.k, k, n0, seq.len_k, slice_col);
        cp_async_wait<0>();
        __syncthreads(); // Q, dO, K and V are there
        Real acc_s[kRows][kCols] = {}, acc_dp[kRows][kCols] = {};
        if constexpr (T::kWide) {
            multiply_chunks(acc_s, smem.rows, q, row0, row_end, k, n0, seq.len_k, lane);
            multiply_chunks(acc_dp, smem.rows, d_o, row0, row_end, v, n0, seq.len_k, lane, of_row.lse);
        } else {
            multiply_nt(acc_s, smem.rows.q, smem.k, depth, lane);
            multiply_nt(acc_dp, smem.rows.d_o, smem.rows.v, depth_v, lane);
            __syncthreads(); // V was read: the next one takes its place
            load_tile(smem.rows.v, v, n0 + T::kBlockN, last.hi);
        }

        const bool whole = full && last.lo <= n0 && n0 + T::kBlockN <= first.hi;
        const int64_t col0 = n0 + lane.x;
        const uint64_t dropped = kModified ? dropped_entries<kRows, kCols, false>(rule, thread_row, col0) : 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int64_t row = thread_row + kLanesY * i;
            const Span keys = span_of(forward, seq, row, col0, whole);
#pragma unroll
            for (int j = 0; j < kCols; ++j) {
                const Real ds =
                    gradient_of<kModified>(rule, acc_s[i][j], acc_dp[i][j], row, col0, kLanesX * j, keys, scale, lse[i],
                                           correction[i], delta[i], dropped >> (kCols * i + j) & 1, keep);
                if (wants_slopes) slopes += static_cast<double>(ds * rule.distance(row, col0 + kLanesX * j));
                smem.ds.row(lane.row<kRows>(i))[lane.col(j)] = acc_dp[i][j];
            }
        }
        __syncwarp(); // dS is there
        multiply_nn<T::kBlockN>(acc_dq, smem.ds, smem.k, lane);
        __syncthreads(); // K was read: the next one takes its place
    }

    const Rows<Real> d_q(args.d_q, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int64_t row = thread_row + kLanesY * i;
        if (row >= row_end) continue;
#pragma unroll
        for (int n = 0; n < kOutputs; n += kVec<Real>) {
            Vec<Real> out;
#pragma unroll
            for (int c = 0; c < kVec<Real>; ++c) out.x[c] = acc_dq[i][n + c] * scale;
            d_q.store_vec(row, slice_col + lane.col(n / kVec<Real>) * kVec<Real>, out);
        }
    }
    if (wants_slopes) {
        const double sum = block_sum(slopes, smem.partial);
        if (threadIdx.x == 0) *slope_sum = sum;
    }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T, bool kModified>
static bool fits() {
    static_assert(sizeof(typename T::Smem) <= (T::kWide ? kAnyGpu : kHalfOfHopper));
    return fa_allow_shared(reinterpret_cast<const void *>(&fused_backward_q<T, kModified>), sizeof(typename T::Smem));
}

template <typename T, bool kModified>
static fa_status launch(const fa_backward_args *args, const BackwardPlan &plan) {
    static_assert(T::kBlockM == kSlopeBlock, "slope_sums has one element for each tile of queries");
    const fa_forward_args *forward = &args->forward;
    const int64_t m_blocks = fa_ceil_div(forward->seqlen_q, T::kBlockM);
    unsigned grid = 0;
    FA_CHECK(fa_grid(m_blocks * slices_of<T>(*forward) * forward->heads_q * forward->batch, &grid));
    if (grid == 0) return FA_OK;
    fused_backward_q<T, kModified><<<grid, kThreads, sizeof(typename T::Smem), fa_stream(forward)>>>(*args, plan);
    return fa_launched("fused backward, d_q");
}

// The narrowest tile that holds a row and fits the device; the wide one fits every device.
template <bool kModified>
static fa_status by_head_dim(const fa_backward_args *args, const BackwardPlan &plan) {
    using Tile64 = QueryTile<float, 64, 4, 8, false>;
    using Tile128 = QueryTile<float, 128, 4, 4, false>;
    using Wide = QueryTile<float, 128, 4, 4, true>;
    const int64_t dim = fa_max(args->forward.head_dim, args->forward.head_dim_v);
    if (dim <= 64 && fits<Tile64, kModified>()) return launch<Tile64, kModified>(args, plan);
    if (dim <= 128 && fits<Tile128, kModified>()) return launch<Tile128, kModified>(args, plan);
    fits<Wide, kModified>();
    return launch<Wide, kModified>(args, plan);
}

fa_status fa_fused_backward_q(const fa_backward_args *args, const BackwardPlan &plan) {
    using WideF64 = QueryTile<double, 64, 4, 2, true>;
    if (args->forward.dtype == FA_FLOAT64) return fits<WideF64, true>(), launch<WideF64, true>(args, plan);
    return fa_has_modified_scores(&args->forward) ? by_head_dim<true>(args, plan) : by_head_dim<false>(args, plan);
}
