// dK and dV: a block owns kBlockN keys of one key/value head and walks over the rows of its query heads that see them.
//
//   load K, V, dO | load Q, row values | S^T = K Q^T, dP^T = V dO^T | P^T, dS^T in registers | P^T -> smem | dV += P^T dO
//                 | load next dO ...
//                 | dS^T -> smem | dK += dS^T Q | load Q, row values | ...                       query head by query head
#include "cuda/fused_backward.cuh"

#include <type_traits>

// kRows x kCols entries of S^T and of dP^T, and kRows x kDim / 8 of dK and of dV, a thread.
// kWide: rows of any head_dim; they pass in chunks, and the block makes one slice of kDim columns of dK and dV.
template <typename Real_, int kDim_, int kRows_, int kCols_, bool kWide_>
struct KeyTile {
    using Real = Real_;
    static constexpr int kDim = kDim_, kRows = kRows_, kCols = kCols_, kOutputs = kDim / kLanesX;
    static constexpr int kBlockN = kWarps * kLanesY * kRows, kBlockM = kLanesX * kCols;
    static constexpr bool kWide = kWide_;
    struct WholeRows {
        Tile<Real, kBlockN, kDim> k, v;
    };
    struct Smem {
        std::conditional_t<kWide, Chunks<Real, kBlockN, kBlockM>, WholeRows> rows;
        Tile<Real, kBlockM, kDim> q, d_o;
        Tile<Real, kBlockN, kBlockM, true> p; // P^T, then dS^T
        Real lse[kBlockM], correction[kBlockM], delta[kBlockM];
    };
};

template <typename T>
static __host__ __device__ int64_t slices_of(const fa_forward_args &args) {
    return T::kWide ? fa_ceil_div(fa_max(args.head_dim, args.head_dim_v), T::kDim) : 1;
}

template <typename T, bool kModified>
__global__ void __launch_bounds__(kThreads, 2)
    fused_backward_kv(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    using Real = typename T::Real;
    constexpr int kRows = T::kRows, kCols = T::kCols, kOutputs = T::kOutputs, kBlockM = T::kBlockM;
    extern __shared__ __align__(16) unsigned char shared[];
    typename T::Smem &smem = *reinterpret_cast<typename T::Smem *>(shared);

    const fa_forward_args &forward = args.forward;
    const int64_t slices = slices_of<T>(forward);
    const int slice_col = static_cast<int>(blockIdx.x % slices) * T::kDim;
    const fa_place place =
        fa_place_of(blockIdx.x / slices, forward.heads_kv, fa_ceil_div(forward.seqlen_k, T::kBlockN));
    const int64_t b = place.b, h_kv = place.head, key0 = place.part * T::kBlockN,
                  group = forward.heads_q / forward.heads_kv;
    const fa_sequence seq = fa_sequence_at(&forward, b);
    if (key0 >= seq.len_k) return;
    const int64_t key_end = fa_min(key0 + T::kBlockN, seq.len_k);
    const fa_interval rows = fa_seeing_rows(&forward, &seq, key0, key_end);
    const int64_t first_block = rows.lo / kBlockM * kBlockM; // dropout counts from multiples of 16
    const Rows<Real> k(forward.k, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim);
    const Rows<Real> v(forward.v, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim_v);
    const Real scale = static_cast<Real>(forward.softmax_scale), keep = static_cast<Real>(1 / (1 - forward.dropout_p));
    const int depth = static_cast<int>(fa_round_up(forward.head_dim, kVec<Real>));
    const int depth_v = static_cast<int>(fa_round_up(forward.head_dim_v, kVec<Real>));
    const Lane lane;

    Real acc_dk[kRows][kOutputs] = {}, acc_dv[kRows][kOutputs] = {};
    if constexpr (!T::kWide) {
        load_tile(smem.rows.k, k, key0, key_end);
        load_tile(smem.rows.v, v, key0, key_end);
    }

    const int64_t m_turns = fa_max(0, fa_ceil_div(rows.hi - first_block, kBlockM)), turns = group * m_turns;
    const auto load_d_o = [&](int64_t turn) {
        if (turn == turns) return;
        const int64_t h = h_kv * group + turn / m_turns;
        const Rows<Real> d_o(args.d_o, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim_v);
        load_tile(smem.d_o, d_o, first_block + turn % m_turns * kBlockM, seq.len_q, slice_col,
                  row_values<Real>(forward, seq, plan, b, h).lse);
    };
    if (turns > 0) load_d_o(0);
    for (int64_t turn = 0; turn < turns; ++turn) { // query head by query head
        const int64_t h = h_kv * group + turn / m_turns, m0 = first_block + turn % m_turns * kBlockM;
        const ScoreRule<Real> rule(forward, seq, b, h);
        const RowValues<Real> of_row = row_values<Real>(forward, seq, plan, b, h);
        const Rows<Real> q(forward.q, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim);
        __syncthreads(); // Q, dS^T and the row values of the turn before were read
        load_tile(smem.q, q, m0, seq.len_q, slice_col);
        for (int i = threadIdx.x; i < kBlockM; i += kThreads) {
            const bool is_row = m0 + i < seq.len_q;
            smem.lse[i] = is_row ? of_row.lse[m0 + i] : infinity(Real());
            smem.correction[i] = is_row ? of_row.correction[m0 + i] : 0;
            smem.delta[i] = is_row ? of_row.delta[m0 + i] : 0;
        }
        cp_async_wait<0>();
        __syncthreads(); // they are there (dO, K and V, too)

        Real acc_s[kRows][kCols] = {}, acc_dp[kRows][kCols] = {};
        if constexpr (T::kWide) {
            multiply_chunks(acc_s, smem.rows, k, key0, key_end, q, m0, seq.len_q, lane);
            const Rows<Real> d_o(args.d_o, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim_v);
            multiply_chunks(acc_dp, smem.rows, v, key0, key_end, d_o, m0, seq.len_q, lane,
                            static_cast<const Real *>(nullptr), of_row.lse);
        } else {
            multiply_nt(acc_s, smem.rows.k, smem.q, depth, lane);
            multiply_nt(acc_dp, smem.rows.v, smem.d_o, depth_v, lane);
        }

        const int64_t last_row = fa_min(m0 + kBlockM, seq.len_q) - 1;
        const bool whole = m0 + kBlockM <= seq.len_q && fa_visible_keys(&forward, &seq, last_row).lo <= key0 &&
                           key0 + T::kBlockN <= fa_visible_keys(&forward, &seq, m0).hi;
        const int64_t thread_key = key0 + lane.row<kRows>(0);
        const uint64_t dropped = kModified ? dropped_entries<kRows, kCols, true>(rule, thread_key, m0 + lane.x) : 0;
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
            const int row = lane.col(j);
            const Span keys = span_of(forward, seq, m0 + row, thread_key, whole);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                gradient_of<kModified>(rule, acc_s[i][j], acc_dp[i][j], m0 + row, thread_key, kLanesY * i, keys, scale,
                                       smem.lse[row], smem.correction[row], smem.delta[row],
                                       dropped >> (kCols * i + j) & 1, keep);
                smem.p.row(lane.row<kRows>(i))[row] = acc_s[i][j];
            }
        }
        __syncwarp(); // P^T is there
        multiply_nn<kBlockM>(acc_dv, smem.p, smem.d_o, lane);
        __syncthreads(); // P^T and dO were read: dS^T and the next dO take their places
        load_d_o(turn + 1);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kCols; ++j) smem.p.row(lane.row<kRows>(i))[lane.col(j)] = acc_dp[i][j];
        __syncwarp(); // dS^T is there
        multiply_nn<kBlockM>(acc_dk, smem.p, smem.q, lane);
    }

    const Rows<Real> d_k(args.d_k, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim);
    const Rows<Real> d_v(args.d_v, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim_v);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int64_t key = key0 + lane.row<kRows>(i);
        if (key >= key_end) continue;
#pragma unroll
        for (int n = 0; n < kOutputs; n += kVec<Real>) {
            Vec<Real> out_k, out_v;
#pragma unroll
            for (int c = 0; c < kVec<Real>; ++c) {
                out_k.x[c] = acc_dk[i][n + c] * scale;
                out_v.x[c] = acc_dv[i][n + c] * keep;
            }
            const int col = slice_col + lane.col(n / kVec<Real>) * kVec<Real>;
            d_k.store_vec(key, col, out_k);
            d_v.store_vec(key, col, out_v);
        }
    }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T, bool kModified>
static bool fits() {
    static_assert(sizeof(typename T::Smem) <= (T::kWide ? kAnyGpu : kHalfOfHopper));
    return fa_allow_shared(reinterpret_cast<const void *>(&fused_backward_kv<T, kModified>), sizeof(typename T::Smem));
}

template <typename T, bool kModified>
static fa_status launch(const fa_backward_args *args, const BackwardPlan &plan) {
    const fa_forward_args *forward = &args->forward;
    const int64_t n_blocks = fa_ceil_div(forward->seqlen_k, T::kBlockN);
    unsigned grid = 0;
    FA_CHECK(fa_grid(n_blocks * slices_of<T>(*forward) * forward->heads_kv * forward->batch, &grid));
    if (grid == 0) return FA_OK;
    fused_backward_kv<T, kModified><<<grid, kThreads, sizeof(typename T::Smem), fa_stream(forward)>>>(*args, plan);
    return fa_launched("fused backward, d_k and d_v");
}

// The narrowest tile that holds a row and fits the device; the wide one fits every device.
template <bool kModified>
static fa_status by_head_dim(const fa_backward_args *args, const BackwardPlan &plan) {
    using Tile64 = KeyTile<float, 64, 4, 8, false>;
    using Tile128 = KeyTile<float, 128, 4, 4, false>;
    using Wide = KeyTile<float, 128, 4, 4, true>;
    const int64_t dim = fa_max(args->forward.head_dim, args->forward.head_dim_v);
    if (dim <= 64 && fits<Tile64, kModified>()) return launch<Tile64, kModified>(args, plan);
    if (dim <= 128 && fits<Tile128, kModified>()) return launch<Tile128, kModified>(args, plan);
    fits<Wide, kModified>();
    return launch<Wide, kModified>(args, plan);
}

fa_status fa_fused_backward_kv(const fa_backward_args *args, const BackwardPlan &plan) {
    using WideF64 = KeyTile<double, 64, 4, 2, true>;
    if (args->forward.dtype == FA_FLOAT64) return fits<WideF64, true>(), launch<WideF64, true>(args, plan);
    return fa_has_modified_scores(&args->forward) ? by_head_dim<true>(args, plan) : by_head_dim<false>(args, plan);
}
