// dQ and d_alibi_slopes: a block owns kBlockM rows of one query head and walks over the keys that they see.
//
//   load Q, dO, V, row values | load K | S^T = K Q^T, dP^T = V dO^T | load next V ...
//                                      | dS^T in registers | dS -> smem | dQ += dS K | load K | ...
//
// In S^T and dP^T the lanes of a warp stand over queries, so that each stores dS as vectors along the keys; in dQ they
// stand over columns, as many lanes as a row has vectors.
#include "cuda/fused_backward.cuh"

// kRows x kCols entries of S^T and of dP^T a thread, and kOutRows rows of a vector of dQ.
// kWide: rows of any head_dim; they pass in chunks, and the block makes one slice of kDim columns of dQ.
template <typename Real_, int kDim_, int kY, int kRows_, int kCols_, bool kWide_>
struct QueryTile {
    using Real = Real_;
    using ScoreLanes = Lanes<kY>;
    static constexpr int kDim = kDim_, kRows = kRows_, kCols = kCols_;
    static constexpr int kBlockN = kWarps * ScoreLanes::kLanesY * kRows, kBlockM = ScoreLanes::kLanesX * kCols;
    static constexpr bool kWide = kWide_;
    using OutLanes = Lanes<32 * kVec<Real> / kDim>;
    static constexpr int kOutRows = kBlockM / (kWarps * OutLanes::kLanesY);
    struct WholeRows {
        Tile<Real, kBlockM, kDim> q, d_o;
        Tile<Real, kBlockN, kDim> v;
    };
    struct Smem {
        std::conditional_t<kWide, Chunks<Real, kBlockN, kBlockM>, WholeRows> rows;
        Tile<Real, kBlockN, kDim> k;
        Tile<Real, kBlockM, kBlockN> ds;
        double partial[kWarps];
    };
};

template <typename T, bool kModified>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    fused_backward_q(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    using Real = typename T::Real;
    constexpr int kRows = T::kRows, kCols = T::kCols;
    extern __shared__ __align__(16) unsigned char shared[];
    typename T::Smem &smem = *reinterpret_cast<typename T::Smem *>(shared);

    const fa_forward_args &forward = args.forward;
    const int64_t m_blocks = fa_ceil_div(forward.seqlen_q, T::kBlockM), slices = slices_of<T>(forward.head_dim);
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
    const auto rows_v = [&] { // made where they are used: they would take registers all along
        return Rows<Real>(forward.v, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim_v);
    };
    const auto rows_d_o = [&] {
        return Rows<Real>(args.d_o, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim_v);
    };
    const ScoreRule<Real> rule(forward, seq, b, h);
    const Real scale = static_cast<Real>(forward.softmax_scale), keep = static_cast<Real>(1 / (1 - forward.dropout_p));
    const int depth = static_cast<int>(fa_round_up(forward.head_dim, kVec<Real>));
    const int depth_v = static_cast<int>(fa_round_up(forward.head_dim_v, kVec<Real>));
    const bool full = row_end - row0 == T::kBlockM;
    const typename T::ScoreLanes lane;
    const typename T::OutLanes out_lane;

    const RowValues<Real> of_row = row_values<Real>(forward, seq, plan, b, h);
    Real lse[kCols], correction[kCols], delta[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
        const int64_t row = row0 + lane.col(j);
        lse[j] = row < row_end ? of_row.lse[row] : infinity(Real());
        correction[j] = row < row_end ? of_row.correction_at(row) : 0;
        delta[j] = row < row_end ? of_row.delta[row] : 0;
    }
    Real acc_dq[T::kOutRows][kVec<Real>] = {};
    double slopes = 0; // of this thread's entries: dS |i + offset - j|
    if constexpr (!T::kWide) {
        load_tile(smem.rows.q, q, row0, row_end);
        load_tile(smem.rows.d_o, rows_d_o(), row0, row_end, 0, blind_rows(plan, of_row));
    }

    const int64_t first_key = first.lo / T::kBlockN * T::kBlockN;
    if constexpr (!T::kWide) load_tile(smem.rows.v, rows_v(), first_key, last.hi);
    for (int64_t n0 = first_key; n0 < last.hi; n0 += T::kBlockN) {
        load_tile(smem.k, k, n0, last.hi, slice_col);
        cp_async_wait<0>();
        __syncthreads(); // Q, dO, K and V are there
        Real acc_s[kRows][kCols] = {}, acc_dp[kRows][kCols] = {};
        if constexpr (T::kWide) {
            multiply_chunks<true>(acc_s, smem.rows, k, n0, seq.len_k, q, row0, row_end, lane);
            multiply_chunks<true>(acc_dp, smem.rows, rows_v(), n0, seq.len_k, rows_d_o(), row0, row_end, lane,
                                  static_cast<const Real *>(nullptr), blind_rows(plan, of_row));
        } else {
            multiply_nt<true, kModified ? 1 : 4>(acc_s, smem.k, smem.rows.q, depth, lane);
            multiply_nt<true, kModified ? 1 : 4>(acc_dp, smem.rows.v, smem.rows.d_o, depth_v, lane);
            __syncthreads(); // V was read: the next one takes its place
            load_tile(smem.rows.v, rows_v(), n0 + T::kBlockN, last.hi);
        }

        const bool whole = full && last.lo <= n0 && n0 + T::kBlockN <= first.hi;
        const int64_t key0 = n0 + lane.template block_row<Real, kRows>();
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
            const int64_t row = row0 + lane.col(j);
            const Span keys = span_of(forward, seq, row, key0, whole);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const int key = lane.template block_step<Real>(i);
                const Real ds = gradient_of<kModified>(rule, acc_s[i][j], acc_dp[i][j], row, key0, key, keys, scale,
                                                       lse[j], correction[j], delta[j], keep);
                if (wants_slopes) slopes += static_cast<double>(ds * rule.distance(row, key0 + key));
            }
        }
        store_transposed(smem.ds, acc_dp, lane);
        __syncthreads(); // dS is there
        multiply_nn<T::kBlockN, kModified || T::kWide ? 1 : 4>(acc_dq, smem.ds, smem.k, out_lane);
        __syncthreads(); // K and dS were read: the next ones take their places
    }
    cp_async_wait<0>(); // no copy outlives its block

    const Rows<Real> d_q(args.d_q, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim);
#pragma unroll
    for (int i = 0; i < T::kOutRows; ++i) {
        const int64_t row = row0 + out_lane.template row<T::kOutRows>(i);
        if (row >= row_end) continue;
        Vec<Real> out;
#pragma unroll
        for (int c = 0; c < kVec<Real>; ++c) out.x[c] = acc_dq[i][c] * scale;
        d_q.store_vec(row, slice_col + out_lane.x * kVec<Real>, out);
    }
    if (wants_slopes) {
        const double sum = block_sum(slopes, smem.partial);
        if (threadIdx.x == 0) *slope_sum = sum;
    }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T, bool kModified>
static fa_status launch(const fa_backward_args *args, const BackwardPlan &plan) {
    static_assert(T::kBlockM == kSlopeBlock, "slope_sums has one element for each tile of queries");
    const fa_forward_args *forward = &args->forward;
    const int64_t blocks =
        fa_ceil_div(forward->seqlen_q, T::kBlockM) * slices_of<T>(forward->head_dim) * forward->heads_q;
    return launch_tile<T>("fused backward, d_q", fused_backward_q<T, kModified>, blocks * forward->batch,
                          fa_stream(forward), *args, plan);
}

template <typename T, bool kModified>
static bool fits() {
    return tile_fits<T>(fused_backward_q<T, kModified>);
}

// The narrowest tile that holds a row and fits the device.
template <bool kModified>
static fa_status by_head_dim(const fa_backward_args *args, const BackwardPlan &plan) {
    using Tile64 = QueryTile<float, 64, 2, 8, 4, false>;
    using Tile128 = QueryTile<float, 128, 1, 8, 2, false>;
    using Wide = QueryTile<float, 128, 1, 4, 2, true>;
    const int64_t dim = fa_max(args->forward.head_dim, args->forward.head_dim_v);
    if (dim <= 64 && fits<Tile64, kModified>()) return launch<Tile64, kModified>(args, plan);
    if (dim <= 128 && fits<Tile128, kModified>()) return launch<Tile128, kModified>(args, plan);
    fits<Wide, true>();
    return launch<Wide, true>(args, plan);
}

fa_status fa_fused_backward_q(const fa_backward_args *args, const BackwardPlan &plan) {
    using WideF64 = QueryTile<double, 64, 1, 2, 2, true>;
    if (args->forward.dtype == FA_FLOAT64) return fits<WideF64, true>(), launch<WideF64, true>(args, plan);
    return fa_has_modified_scores(&args->forward) ? by_head_dim<true>(args, plan) : by_head_dim<false>(args, plan);
}
