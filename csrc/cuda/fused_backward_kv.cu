// dK and dV: a block owns kBlockN keys of one key/value head and walks over the rows of its query heads that see them.
//
//   load K, V, dO | load Q, row values | S = Q K^T, dP = dO V^T | P, dS in registers | P^T -> smem | dV += P^T dO
//                 | load next dO ...
//                 | dS^T -> smem | dK += dS^T Q | load Q, row values | ...                       query head by query head
//
// In S and dP the lanes of a warp stand over keys, so that each stores P^T as vectors along the queries; in dV and dK
// they stand over columns, as many lanes as a row has vectors.
#include "cuda/fused_backward.cuh"

// kRows x kCols entries of S and of dP a thread, and kOutRows rows of a vector of dK and of dV.
// kWide: rows of any head_dim; they pass in chunks, and the block makes one slice of kDim columns of dK and dV.
template <typename Real_, int kDim_, int kY, int kRows_, int kCols_, bool kWide_>
struct KeyTile {
    using Real = Real_;
    using ScoreLanes = Lanes<kY>;
    static constexpr int kDim = kDim_, kRows = kRows_, kCols = kCols_;
    static constexpr int kBlockM = kWarps * ScoreLanes::kLanesY * kRows, kBlockN = ScoreLanes::kLanesX * kCols;
    static constexpr bool kWide = kWide_;
    using OutLanes = Lanes<32 * kVec<Real> / kDim>;
    static constexpr int kOutRows = kBlockN / (kWarps * OutLanes::kLanesY);
    struct WholeRows {
        Tile<Real, kBlockN, kDim> k, v;
    };
    struct Smem {
        std::conditional_t<kWide, Chunks<Real, kBlockM, kBlockN>, WholeRows> rows;
        Tile<Real, kBlockM, kDim> q, d_o;
        Tile<Real, kBlockN, kBlockM> p; // P^T, then dS^T
        Real lse[kBlockM], correction[kBlockM], delta[kBlockM];
    };
};

template <typename T, bool kModified>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    fused_backward_kv(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    using Real = typename T::Real;
    constexpr int kRows = T::kRows, kCols = T::kCols, kBlockM = T::kBlockM;
    extern __shared__ __align__(16) unsigned char shared[];
    typename T::Smem &smem = *reinterpret_cast<typename T::Smem *>(shared);

    const fa_forward_args &forward = args.forward;
    const int64_t slices = slices_of<T>(fa_max(forward.head_dim, forward.head_dim_v));
    const int slice_col = static_cast<int>(blockIdx.x % slices) * T::kDim;
    const fa_place place =
        fa_place_of(blockIdx.x / slices, forward.heads_kv, fa_ceil_div(forward.seqlen_k, T::kBlockN));
    const int64_t b = place.b, h_kv = place.head, key0 = place.part * T::kBlockN,
                  group = forward.heads_q / forward.heads_kv;
    const fa_sequence seq = fa_sequence_at(&forward, b);
    if (key0 >= seq.len_k) return;
    const int64_t key_end = fa_min(key0 + T::kBlockN, seq.len_k);
    const fa_interval rows = fa_seeing_rows(&forward, &seq, key0, key_end);
    const auto rows_k = [&] { // made where they are used: they would take registers all along
        return Rows<Real>(forward.k, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim);
    };
    const auto rows_v = [&] {
        return Rows<Real>(forward.v, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim_v);
    };
    const Real scale = static_cast<Real>(forward.softmax_scale), keep = static_cast<Real>(1 / (1 - forward.dropout_p));
    const int depth = static_cast<int>(fa_round_up(forward.head_dim, kVec<Real>));
    const int depth_v = static_cast<int>(fa_round_up(forward.head_dim_v, kVec<Real>));
    const typename T::ScoreLanes lane;
    const typename T::OutLanes out_lane;

    Real acc_dk[T::kOutRows][kVec<Real>] = {}, acc_dv[T::kOutRows][kVec<Real>] = {};
    if constexpr (!T::kWide) {
        load_tile(smem.rows.k, rows_k(), key0, key_end);
        load_tile(smem.rows.v, rows_v(), key0, key_end);
    }

    const auto load_d_o = [&](int64_t h, int64_t m0) {
        const Rows<Real> d_o(args.d_o, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim_v);
        load_tile(smem.d_o, d_o, m0, seq.len_q, slice_col,
                  blind_rows(plan, row_values<Real>(forward, seq, plan, b, h)));
    };
    // Last rows first: where causal, later rows weigh less, and a sum that begins with its small terms is rounded less.
    const int64_t last_block = (rows.hi - 1) / kBlockM * kBlockM, h_end = rows.lo < rows.hi ? (h_kv + 1) * group : 0;
    int64_t h = h_kv * group, m0 = last_block, next_h, next_m0; // query head by query head
    if (h < h_end) load_d_o(h, m0);
    for (; h < h_end; h = next_h, m0 = next_m0) {
        const bool is_last = m0 <= rows.lo;
        next_h = is_last ? h + 1 : h, next_m0 = is_last ? last_block : m0 - kBlockM;
        const ScoreRule<Real> rule(forward, seq, b, h);
        const RowValues<Real> of_row = row_values<Real>(forward, seq, plan, b, h);
        const Rows<Real> q(forward.q, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim);
        __syncthreads(); // Q, dS^T and the row values of the turn before were read
        load_tile(smem.q, q, m0, seq.len_q, slice_col);
        for (int i = threadIdx.x; i < kBlockM; i += kThreads) {
            const bool is_row = m0 + i < seq.len_q;
            smem.lse[i] = is_row ? of_row.lse[m0 + i] : infinity(Real());
            smem.correction[i] = is_row ? of_row.correction_at(m0 + i) : 0;
            smem.delta[i] = is_row ? of_row.delta[m0 + i] : 0;
        }
        cp_async_wait<0>();
        __syncthreads(); // they are there (dO, K and V, too)

        Real acc_s[kRows][kCols] = {}, acc_dp[kRows][kCols] = {};
        if constexpr (T::kWide) {
            const Rows<Real> d_o(args.d_o, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim_v);
            multiply_chunks<true>(acc_s, smem.rows, q, m0, seq.len_q, rows_k(), key0, key_end, lane);
            multiply_chunks<true>(acc_dp, smem.rows, d_o, m0, seq.len_q, rows_v(), key0, key_end, lane,
                                  blind_rows(plan, of_row));
        } else {
            multiply_nt<true, kModified ? 1 : 4>(acc_s, smem.q, smem.rows.k, depth, lane);
            multiply_nt<true, kModified ? 1 : 4>(acc_dp, smem.d_o, smem.rows.v, depth_v, lane);
        }

        const int64_t last_row = fa_min(m0 + kBlockM, seq.len_q) - 1;
        const bool whole = m0 + kBlockM <= seq.len_q && fa_visible_keys(&forward, &seq, last_row).lo <= key0 &&
                           key0 + T::kBlockN <= fa_visible_keys(&forward, &seq, m0).hi;
        const int64_t thread_key = key0 + lane.x;
        const int first_row = lane.template block_row<Real, kRows>();
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int row = first_row + lane.template block_step<Real>(i);
            const Span keys = span_of(forward, seq, m0 + row, thread_key, whole);
#pragma unroll
            for (int j = 0; j < kCols; ++j)
                gradient_of<kModified>(rule, acc_s[i][j], acc_dp[i][j], m0 + row, thread_key, lane.kLanesX * j, keys,
                                       scale, smem.lse[row], smem.correction[row], smem.delta[row], keep);
        }
        store_transposed(smem.p, acc_s, lane);
        __syncthreads(); // P^T is there
        multiply_nn<kBlockM, 1>(acc_dv, smem.p, smem.d_o, out_lane);
        __syncthreads(); // P^T and dO were read: dS^T and the next dO take their places
        if (next_h < h_end) load_d_o(next_h, next_m0);
        store_transposed(smem.p, acc_dp, lane);
        __syncthreads(); // dS^T is there
        multiply_nn<kBlockM, 1>(acc_dk, smem.p, smem.q, out_lane);
    }
    cp_async_wait<0>(); // no copy outlives its block

    const Rows<Real> d_k(args.d_k, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim);
    const Rows<Real> d_v(args.d_v, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim_v);
#pragma unroll
    for (int i = 0; i < T::kOutRows; ++i) {
        const int64_t key = key0 + out_lane.template row<T::kOutRows>(i);
        if (key >= key_end) continue;
        Vec<Real> out_k, out_v;
#pragma unroll
        for (int c = 0; c < kVec<Real>; ++c) {
            out_k.x[c] = acc_dk[i][c] * scale;
            out_v.x[c] = acc_dv[i][c] * keep;
        }
        d_k.store_vec(key, slice_col + out_lane.x * kVec<Real>, out_k);
        d_v.store_vec(key, slice_col + out_lane.x * kVec<Real>, out_v);
    }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T, bool kModified>
static fa_status launch(const fa_backward_args *args, const BackwardPlan &plan) {
    const fa_forward_args *forward = &args->forward;
    const int64_t blocks = fa_ceil_div(forward->seqlen_k, T::kBlockN) *
                           slices_of<T>(fa_max(forward->head_dim, forward->head_dim_v)) * forward->heads_kv;
    return launch_tile<T>("fused backward, d_k and d_v", fused_backward_kv<T, kModified>, blocks * forward->batch,
                          fa_stream(forward), *args, plan);
}

template <typename T, bool kModified>
static bool fits() {
    return tile_fits<T>(fused_backward_kv<T, kModified>);
}

// The narrowest tile that holds a row and fits the device.
template <bool kModified>
static fa_status by_head_dim(const fa_backward_args *args, const BackwardPlan &plan) {
    using Tile64 = KeyTile<float, 64, 2, 8, 4, false>;
    using Tile128 = KeyTile<float, 128, 1, 8, 2, false>;
    using Wide = KeyTile<float, 128, 1, 8, 2, true>;
    const int64_t dim = fa_max(args->forward.head_dim, args->forward.head_dim_v);
    if (dim <= 64 && fits<Tile64, kModified>()) return launch<Tile64, kModified>(args, plan);
    if (dim <= 128 && fits<Tile128, kModified>()) return launch<Tile128, kModified>(args, plan);
    fits<Wide, true>();
    return launch<Wide, true>(args, plan);
}

fa_status fa_fused_backward_kv(const fa_backward_args *args, const BackwardPlan &plan) {
    using WideF64 = KeyTile<double, 64, 1, 4, 1, true>;
    if (args->forward.dtype == FA_FLOAT64) return fits<WideF64, true>(), launch<WideF64, true>(args, plan);
    return fa_has_modified_scores(&args->forward) ? by_head_dim<true>(args, plan) : by_head_dim<false>(args, plan);
}
