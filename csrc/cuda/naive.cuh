// Attention as the formula reads it: one thread for each element of what a step writes, the score matrix in memory.
// Here is what both passes share: naive.cu has the forward pass, naive_backward.cu the backward pass.
//
//   forward   scores s -> P = softmax(s), lse -> o = P v
//   backward  scores s -> P, delta = rowsum(d_o * o) - d_lse -> dS = P * (dropout(d_o v^T) - delta)
//             -> d_v = dropout(P)^T d_o, d_q = softmax_scale dS k, d_k = softmax_scale dS^T q, and sums of dS
//
// Of a matrix only the visible entries are written and read. Dropout puts zeros into P once lse or dS has been taken
// from it; its 1 / (1 - p) multiplies sums. No two threads add to one sum, so that every run gives the same bits.
#ifndef FA_NAIVE_CUH
#define FA_NAIVE_CUH

#include "cuda/device.cuh"

enum { kNaiveThreads = 256 }; // of a block: any multiple of 32 serves

template <typename Real>
struct Naive {
    fa_backward_args backward; // in the forward pass forward alone
    Real *p, *ds;              // [B][Hq][Lq][Lk] scores, then P, then what dropout keeps of it; dS
    double *delta;             // [B][Hq][Lq]
    // [B][Hq][Lq] what each row adds to the gradients of a bias without a key axis, of the slopes and of the sinks
    double *bias_sums, *slope_sums, *sink_sums;
    size_t bytes;
};

template <typename Real>
static Naive<Real> naive_of(const fa_backward_args &backward, bool is_backward) {
    const fa_forward_args &args = backward.forward;
    const size_t rows = static_cast<size_t>(args.batch * args.heads_q * args.seqlen_q);
    const size_t matrix_bytes = rows * static_cast<size_t>(args.seqlen_k) * sizeof(Real);
    fa_arena arena = {static_cast<char *>(args.workspace), 0};
    Naive<Real> naive = {backward};
    naive.p = static_cast<Real *>(fa_take(&arena, matrix_bytes));
    if (is_backward) {
        naive.ds = static_cast<Real *>(fa_take(&arena, matrix_bytes));
        naive.delta = static_cast<double *>(fa_take(&arena, rows * sizeof(double)));
        naive.bias_sums = static_cast<double *>(fa_take(&arena, rows * sizeof(double)));
        naive.slope_sums = static_cast<double *>(fa_take(&arena, rows * sizeof(double)));
        naive.sink_sums = static_cast<double *>(fa_take(&arena, rows * sizeof(double)));
    }
    naive.bytes = arena.used_bytes;
    return naive;
}

// ---- who does what --------------------------------------------------------------------------------------------------

// A thread takes every index_step()-th element from first_index() on: one, unless a grid has too few threads.
__device__ __forceinline__ int64_t first_index() {
    return static_cast<int64_t>(blockIdx.x) * kNaiveThreads + threadIdx.x;
}
__device__ __forceinline__ int64_t index_step() { return static_cast<int64_t>(gridDim.x) * kNaiveThreads; }

template <typename Problem>
static fa_status launch(const char *what, void (*kernel)(Problem, int64_t), const Problem &problem, int64_t elements,
                        cudaStream_t stream) {
    const int64_t blocks = fa_min(fa_ceil_div(elements, kNaiveThreads), INT32_MAX);
    return fa_launch(what, kernel, blocks, kNaiveThreads, 0, stream, problem, elements);
}

struct QueryRow { // a row of one query head
    int64_t b, h, h_kv, row;
    fa_sequence seq;
    fa_interval keys; // none past the end of the sequence
    bool is_inside;   // the sequence
};

__device__ __forceinline__ QueryRow query_row(const fa_forward_args &args, int64_t index) { // of [B][Hq][Lq]
    const fa_place place = fa_place_of(index, args.heads_q, args.seqlen_q);
    QueryRow r = {place.b, place.head, place.head / (args.heads_q / args.heads_kv), place.part};
    r.seq = fa_sequence_at(&args, r.b);
    r.is_inside = r.row < r.seq.len_q;
    if (r.is_inside) r.keys = fa_visible_keys(&args, &r.seq, r.row);
    return r;
}

__device__ __forceinline__ bool contains(const fa_interval &keys, int64_t col) {
    return col >= keys.lo && col < keys.hi;
}

// First element of the query's row of t, and of key `col`.
__device__ __forceinline__ int64_t q_offset(const fa_tensor &t, const QueryRow &r) {
    return fa_row_offset(&t, r.seq.batch_index, r.h, r.seq.row_q + r.row);
}
__device__ __forceinline__ int64_t k_offset(const fa_tensor &t, const QueryRow &r, int64_t col) {
    return fa_row_offset(&t, r.seq.batch_index, r.h_kv, r.seq.row_k + col);
}

// q_i.k_j, or d_o_i.v_j
template <typename Real>
__device__ __forceinline__ Real dot(const QueryRow &r, int64_t col, const fa_tensor &row_side,
                                    const fa_tensor &key_side, int64_t width, fa_dtype dtype) {
    const int64_t row_at = q_offset(row_side, r), key_at = k_offset(key_side, r, col);
    Real sum = 0;
    for (int64_t d = 0; d < width; ++d)
        sum += load<Real>(row_side.data, dtype, row_at + d) * load<Real>(key_side.data, dtype, key_at + d);
    return sum;
}

template <typename Real>
__device__ __forceinline__ Real score_at(const fa_forward_args &args, const QueryRow &r, int64_t col, Real *cap_slope) {
    const ScoreRule<Real> rule(args, r.seq, r.b, r.h);
    const Real s = static_cast<Real>(args.softmax_scale) * dot<Real>(r, col, args.q, args.k, args.head_dim, args.dtype);
    return rule.score(s, r.row, col, cap_slope);
}

// ---- steps of both passes -------------------------------------------------------------------------------------------

template <typename Real>
static __global__ void __launch_bounds__(kNaiveThreads)
    naive_scores(const __grid_constant__ Naive<Real> naive, int64_t entries) {
    const fa_forward_args &args = naive.backward.forward;
    for (int64_t i = first_index(); i < entries; i += index_step()) {
        const QueryRow r = query_row(args, i / args.seqlen_k);
        const int64_t col = i % args.seqlen_k;
        Real cap_slope;
        if (contains(r.keys, col)) naive.p[i] = score_at(args, r, col, &cap_slope);
    }
}

template <typename Real>
struct Softmax {
    Real sink, max, sum; // P = e^(s - max) / sum; sum = 0: no visible key and no sink
};

// p: the scores of row r, which become P.
template <typename Real>
__device__ __forceinline__ Softmax<Real> softmax_row(const fa_forward_args &args, const QueryRow &r, Real *p) {
    const Real none = -infinity(Real());
    const Real sink = args.sinks.data ? load_per_head<Real>(args.sinks, 0, r.h) : none;
    Real max = sink;
    for (int64_t col = r.keys.lo; col < r.keys.hi; ++col) max = p[col] > max ? p[col] : max;
    if (max == none) max = 0; // every term of the sum is 0, and -inf - max no NaN
    Real sum = exp_of(sink - max);
    for (int64_t col = r.keys.lo; col < r.keys.hi; ++col) {
        p[col] = exp_of(p[col] - max);
        sum += p[col];
    }
    for (int64_t col = r.keys.lo; col < r.keys.hi; ++col) p[col] = sum == 0 ? 0 : p[col] / sum;
    return {sink, max, sum};
}

// P v or dS k; in the backward pass also P^T d_o and dS^T q.
template <typename Real>
struct Product {
    fa_forward_args args;
    const Real *matrix; // [B][Hq][Lq][Lk]
    fa_tensor in, out;  // rows of `width` elements
    int64_t width;
    Real factor;
};

// out_i = factor * sum_j matrix_ij in_j
template <typename Real>
static __global__ void __launch_bounds__(kNaiveThreads)
    naive_sum_keys(const __grid_constant__ Product<Real> product, int64_t elements) {
    const fa_forward_args &args = product.args;
    for (int64_t i = first_index(); i < elements; i += index_step()) {
        const int64_t row_index = i / product.width, d = i % product.width;
        const QueryRow r = query_row(args, row_index);
        if (!r.is_inside) continue;
        Real sum = 0;
        for (int64_t col = r.keys.lo; col < r.keys.hi; ++col)
            sum += product.matrix[row_index * args.seqlen_k + col] *
                   load<Real>(product.in.data, args.dtype, k_offset(product.in, r, col) + d);
        store(product.out.data, args.dtype, q_offset(product.out, r) + d, product.factor * sum);
    }
}

#endif
