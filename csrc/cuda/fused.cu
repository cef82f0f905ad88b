// FlashAttention forward on CUDA cores: every dtype, head_dim and feature, no score matrix in memory.
//
//   S = Q K^T,  m' = max(m, rowmax S),  P = e^(S - m'),  l = e^(m - m') l + rowsum P,  O = e^(m - m') O + P V
//   o = O / l,  lse = m + ln l                                             Dao, FlashAttention-2 (2023), algorithm 1
//
// A block of 128 threads takes kBlockM rows of Q of one head and walks over the keys that they see, kBlockN at a time:
//
//   load Q, K | load V ...
//             | S = Q K^T | load next K ...
//                         | mask, softmax: S -> P, in registers | P -> smem | O += P V | load next V ...
//
// The lanes that share a row are neighbours in a warp, so its maximum and sum are three shuffles; P is read by the warp
// that wrote it. Two blocks share an SM: one computes while the other loads.
#include "cuda/scores.cuh"

// kRows x kCols scores and kRows x kDim / 8 outputs a thread: as many as the registers hold, since each vector read from
// shared memory costs four cycles of the SM and serves only as many fma as the tile is wide.
// kWide: rows of any head_dim; Q and K pass in chunks, and the block makes one slice of kDim columns of O.
template <typename Real_, int kDim_, int kRows_, int kCols_, bool kWide_>
struct ForwardTile {
    using Real = Real_;
    static constexpr int kDim = kDim_, kRows = kRows_, kCols = kCols_, kOutputs = kDim / Lanes<4>::kLanesX;
    static constexpr int kBlockM = kWarps * Lanes<4>::kLanesY * kRows, kBlockN = Lanes<4>::kLanesX * kCols;
    static constexpr bool kWide = kWide_;
    static_assert(kBlockM % 16 == 0 && kBlockN % 16 == 0, "dropped_entries counts from multiples of 16");
    struct WholeRows {
        Tile<Real, kBlockM, kDim> q;
        Tile<Real, kBlockN, kDim> k;
    };
    struct Smem {
        std::conditional_t<kWide, Chunks<Real, kBlockM, kBlockN>, WholeRows> rows;
        Tile<Real, kBlockN, kDim> v;
        Tile<Real, kBlockM, kBlockN, true> p;
    };
};

template <typename T, bool kModified>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) fused_forward(const __grid_constant__ fa_forward_args args) {
    using Real = typename T::Real;
    constexpr int kRows = T::kRows, kCols = T::kCols, kOutputs = T::kOutputs;
    extern __shared__ __align__(16) unsigned char shared[];
    typename T::Smem &smem = *reinterpret_cast<typename T::Smem *>(shared);

    const int64_t m_blocks = fa_ceil_div(args.seqlen_q, T::kBlockM), slices = slices_of<T>(args.head_dim_v);
    const fa_place place = fa_place_of(blockIdx.x / slices, args.heads_q, m_blocks);
    const int slice = static_cast<int>(blockIdx.x % slices), slice_col = slice * T::kDim;
    const int64_t b = place.b, h = place.head, h_kv = h / (args.heads_q / args.heads_kv);
    const int64_t row0 = (m_blocks - 1 - place.part) * T::kBlockM; // causal: the longest rows first
    const fa_sequence seq = fa_sequence_at(&args, b);
    if (row0 >= seq.len_q) return;
    const int64_t row_end = fa_min(row0 + T::kBlockM, seq.len_q);
    const fa_interval first = fa_visible_keys(&args, &seq, row0), last = fa_visible_keys(&args, &seq, row_end - 1);
    const Rows<Real> q(args.q, args.dtype, seq.batch_index, h, seq.row_q, args.head_dim);
    const Rows<Real> k(args.k, args.dtype, seq.batch_index, h_kv, seq.row_k, args.head_dim);
    const Rows<Real> v(args.v, args.dtype, seq.batch_index, h_kv, seq.row_k, args.head_dim_v);
    const ScoreRule<Real> rule(args, seq, b, h);
    const Lanes<4> lane;
    const int depth = static_cast<int>(fa_round_up(args.head_dim, kVec<Real>));
    const Real scale = static_cast<Real>(args.softmax_scale);
    const bool full = row_end - row0 == T::kBlockM;
    const int64_t thread_row = row0 + lane.row<kRows>(0);

    Real acc_o[kRows][kOutputs] = {}, row_max[kRows], row_sum[kRows]; // row_sum: of this lane's columns
    const bool has_sink = args.sinks.data != nullptr;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        row_max[i] = has_sink ? load_per_head<Real>(args.sinks, 0, h) : -infinity(Real());
        row_sum[i] = has_sink && lane.x == 0 && row_max[i] != -infinity(Real()) ? 1 : 0;
    }
    if constexpr (!T::kWide) load_tile(smem.rows.q, q, row0, row_end);

    const int64_t first_key = first.lo / T::kBlockN * T::kBlockN;
    if constexpr (!T::kWide) load_tile(smem.rows.k, k, first_key, last.hi);
    for (int64_t n0 = first_key; n0 < last.hi; n0 += T::kBlockN) {
        cp_async_wait<0>();
        __syncthreads(); // Q and K are there, V was read
        load_tile(smem.v, v, n0, last.hi, slice_col);
        Real acc_s[kRows][kCols] = {};
        if constexpr (T::kWide) {
            multiply_chunks<false>(acc_s, smem.rows, q, row0, row_end, k, n0, seq.len_k, lane);
        } else {
            multiply_nt<false, kModified ? 1 : 4>(acc_s, smem.rows.q, smem.rows.k, depth, lane);
            __syncthreads(); // K was read: the next one takes its place
            load_tile(smem.rows.k, k, n0 + T::kBlockN, last.hi);
        }
        const int64_t col0 = n0 + lane.x;
        const bool whole = full && last.lo <= n0 && n0 + T::kBlockN <= first.hi;
        const uint64_t dropped = kModified ? dropped_entries<kRows, kCols>(rule, thread_row, col0) : 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int64_t row = thread_row + lane.kLanesY * i;
            const Span keys = span_of(args, seq, row, col0, whole);
            Real new_max = -infinity(Real());
#pragma unroll
            for (int j = 0; j < kCols; ++j) {
                acc_s[i][j] = score_of<kModified>(rule, product(acc_s[i][j], scale), row, col0, lane.kLanesX * j, keys);
                new_max = max(new_max, acc_s[i][j]);
            }
            new_max = max(row_max[i], row_max_of<lane.kLanesX>(new_max));
            const Real shift = new_max == -infinity(Real()) ? 0 : new_max; // no key yet: e^(-inf - 0) = 0
            const Real rescale = exp_of(row_max[i] - shift);
            row_max[i] = new_max;
            row_sum[i] *= rescale;
#pragma unroll
            for (int n = 0; n < kOutputs; ++n) acc_o[i][n] *= rescale;
#pragma unroll
            for (int j = 0; j < kCols; ++j) {
                const Real p = exp_of(acc_s[i][j] - shift);
                row_sum[i] += p;
                smem.p.row(lane.row<kRows>(i))[lane.col(j)] = dropped >> (kCols * i + j) & 1 ? 0 : p;
            }
        }
        cp_async_wait<T::kWide ? 0 : 1>();
        __syncthreads(); // V is there
        multiply_nn<T::kBlockN, kModified ? 1 : 2>(acc_o, smem.p, smem.v, lane);
    }
    cp_async_wait<0>(); // no copy outlives its block

    const Rows<Real> o(args.o, args.dtype, seq.batch_index, h, seq.row_q, args.head_dim_v);
    const Real keep = static_cast<Real>(1 / (1 - args.dropout_p));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int64_t row = thread_row + lane.kLanesY * i;
        const Real sum = row_sum_of<lane.kLanesX>(row_sum[i]);
        if (row >= row_end) continue;
        const Real normalise = sum == 0 ? 0 : keep / sum; // a NaN stays one
#pragma unroll
        for (int n = 0; n < kOutputs; n += kVec<Real>) {
            Vec<Real> out;
#pragma unroll
            for (int c = 0; c < kVec<Real>; ++c) out.x[c] = acc_o[i][n + c] * normalise;
            o.store_vec(row, slice_col + lane.col(n / kVec<Real>) * kVec<Real>, out);
        }
        if (lane.x == 0 && slice == 0)
            store(args.lse.data, fa_lse_dtype(&args), fa_row_offset(&args.lse, seq.batch_index, h, seq.row_q + row),
                  sum == 0 ? -infinity(Real()) : row_max[i] + log_of(sum));
    }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T, bool kModified>
static fa_status launch(const fa_forward_args *args) {
    const int64_t blocks = fa_ceil_div(args->seqlen_q, T::kBlockM) * slices_of<T>(args->head_dim_v);
    return launch_tile<T>("fused forward", fused_forward<T, kModified>, blocks * args->heads_q * args->batch,
                          fa_stream(args), *args);
}

template <typename T, bool kModified>
static bool fits() {
    return tile_fits<T>(fused_forward<T, kModified>);
}

// The narrowest tile that holds a row and fits the device.
template <bool kModified>
static fa_status by_head_dim(const fa_forward_args *args) {
    using Tile64 = ForwardTile<float, 64, 4, 8, false>;
    using Tile128 = ForwardTile<float, 128, 4, 6, false>;
    using Wide = ForwardTile<float, 128, 4, 8, true>;
    const int64_t dim = fa_max(args->head_dim, args->head_dim_v);
    if (dim <= 64 && fits<Tile64, kModified>()) return launch<Tile64, kModified>(args);
    if (dim <= 128 && fits<Tile128, kModified>()) return launch<Tile128, kModified>(args);
    fits<Wide, true>();
    return launch<Wide, true>(args);
}

size_t fa_cuda_fused_forward_bytes(const fa_forward_args *) { return 0; }

fa_status fa_cuda_fused_forward(const fa_forward_args *args) {
    using WideF64 = ForwardTile<double, 64, 4, 4, true>;
    if (args->dtype == FA_FLOAT64) return fits<WideF64, true>(), launch<WideF64, true>(args);
    return fa_has_modified_scores(args) ? by_head_dim<true>(args) : by_head_dim<false>(args);
}
