// The naive backward pass: P and dS as whole matrices, then one sum for each element of a gradient.
#include "cuda/naive.cuh"

// P, delta, and P of the sink times -delta.
template <typename Real>
__global__ void __launch_bounds__(kNaiveThreads) naive_delta(const __grid_constant__ Naive<Real> naive, int64_t rows) {
    const fa_forward_args &args = naive.backward.forward;
    const fa_tensor &d_o = naive.backward.d_o, &d_lse = naive.backward.d_lse;
    for (int64_t i = first_index(); i < rows; i += index_step()) {
        const QueryRow r = query_row(args, i);
        if (!r.is_inside) continue;
        const Softmax<Real> softmax = softmax_row(args, r, naive.p + i * args.seqlen_k);
        double delta = 0;
        for (int64_t d = 0; d < args.head_dim_v; ++d)
            delta += load<double>(args.o.data, args.dtype, q_offset(args.o, r) + d) *
                     load<double>(d_o.data, args.dtype, q_offset(d_o, r) + d);
        if (d_lse.data) delta -= load<double>(d_lse.data, fa_lse_dtype(&args), q_offset(d_lse, r));
        if (softmax.sum == 0) delta = 0; // lse = -inf whatever the inputs
        const Real p_sink = softmax.sum == 0 ? 0 : exp_of(softmax.sink - softmax.max) / softmax.sum;
        naive.delta[i] = delta;
        naive.sink_sums[i] = -p_sink * delta;
    }
}

template <typename Real>
__global__ void __launch_bounds__(kNaiveThreads)
    naive_d_scores(const __grid_constant__ Naive<Real> naive, int64_t entries) {
    const fa_forward_args &args = naive.backward.forward;
    const Real kept_scale = static_cast<Real>(1 / (1 - args.dropout_p));
    for (int64_t i = first_index(); i < entries; i += index_step()) {
        const int64_t row_index = i / args.seqlen_k, col = i % args.seqlen_k;
        const QueryRow r = query_row(args, row_index);
        if (!contains(r.keys, col)) continue;
        const Real d_p = dot<Real>(r, col, naive.backward.d_o, args.v, args.head_dim_v, args.dtype);
        const bool keeps = ScoreRule<Real>(args, r.seq, r.b, r.h).keeps(r.row, col);
        const Real delta = static_cast<Real>(naive.delta[row_index]);
        const Real p = naive.p[i];
        naive.ds[i] = p == 0 ? 0 : p * ((keeps ? kept_scale * d_p : 0) - delta); // d_o may be NaN where no key is seen
        if (!keeps) naive.p[i] = 0;
    }
}

template <typename Real>
__global__ void __launch_bounds__(kNaiveThreads)
    naive_row_sums(const __grid_constant__ Naive<Real> naive, int64_t rows) {
    const fa_forward_args &args = naive.backward.forward;
    for (int64_t i = first_index(); i < rows; i += index_step()) {
        const QueryRow r = query_row(args, i);
        const ScoreRule<double> rule(args, r.seq, r.b, r.h);
        double bias_sum = 0, slope_sum = 0;
        for (int64_t col = r.keys.lo; col < r.keys.hi; ++col) {
            const double ds = static_cast<double>(naive.ds[i * args.seqlen_k + col]);
            bias_sum += ds;
            slope_sum -= ds * rule.distance(r.row, col);
        }
        naive.bias_sums[i] = bias_sum;
        naive.slope_sums[i] = slope_sum;
    }
}

// What an axis of a gradient stands for: all of it where the gradient has it not.
__device__ __forceinline__ fa_interval along(int64_t stride, int64_t at, int64_t size) {
    return stride ? fa_interval{at, at + 1} : fa_interval{0, size};
}
static int64_t axis_size(int64_t stride, int64_t size) { return stride ? size : 1; }

template <typename Real>
__global__ void __launch_bounds__(kNaiveThreads)
    naive_d_bias(const __grid_constant__ Naive<Real> naive, int64_t elements) {
    const fa_forward_args &args = naive.backward.forward;
    const fa_bias &t = naive.backward.d_bias;
    const int64_t heads_size = t.stride_h ? args.heads_q : 1;
    const int64_t rows_size = t.stride_q ? args.seqlen_q : 1, cols_size = t.stride_k ? args.seqlen_k : 1;
    for (int64_t i = first_index(); i < elements; i += index_step()) {
        const fa_place place = fa_place_of(i / cols_size, heads_size, rows_size);
        const int64_t col = i % cols_size;
        const fa_interval batches = along(t.stride_b, place.b, args.batch);
        const fa_interval heads = along(t.stride_h, place.head, args.heads_q);
        const fa_interval rows = along(t.stride_q, place.part, args.seqlen_q);
        double sum = 0;
        for (int64_t b = batches.lo; b < batches.hi; ++b) {
            const fa_sequence seq = fa_sequence_at(&args, b);
            for (int64_t h = heads.lo; h < heads.hi; ++h)
                for (int64_t row = rows.lo; row < fa_min(rows.hi, seq.len_q); ++row) {
                    const int64_t at = (b * args.heads_q + h) * args.seqlen_q + row;
                    if (!t.stride_k)
                        sum += naive.bias_sums[at];
                    else if (contains(fa_visible_keys(&args, &seq, row), col))
                        sum += static_cast<double>(naive.ds[at * args.seqlen_k + col]);
                }
        }
        store(t.data, t.dtype,
              place.b * t.stride_b + place.head * t.stride_h + place.part * t.stride_q + col * t.stride_k, sum);
    }
}

struct PerHead {
    fa_forward_args args;
    fa_per_head gradient;
    const double *sums; // [B][Hq][Lq]
};

__global__ void __launch_bounds__(kNaiveThreads) naive_per_head(const __grid_constant__ PerHead p, int64_t elements) {
    for (int64_t i = first_index(); i < elements; i += index_step()) {
        const int64_t h = i % p.args.heads_q;
        const fa_interval batches = along(p.gradient.stride_b, i / p.args.heads_q, p.args.batch);
        double sum = 0;
        for (int64_t b = batches.lo; b < batches.hi; ++b) {
            const double *row_sums = p.sums + (b * p.args.heads_q + h) * p.args.seqlen_q;
            const int64_t rows = fa_sequence_at(&p.args, b).len_q;
            for (int64_t row = 0; row < rows; ++row) sum += row_sums[row];
        }
        store(p.gradient.data, p.gradient.dtype, i / p.args.heads_q * p.gradient.stride_b + h * p.gradient.stride_h,
              sum);
    }
}

// dS through the softcap, once bias and slopes have taken their sums.
template <typename Real>
__global__ void __launch_bounds__(kNaiveThreads)
    naive_through_softcap(const __grid_constant__ Naive<Real> naive, int64_t entries) {
    const fa_forward_args &args = naive.backward.forward;
    for (int64_t i = first_index(); i < entries; i += index_step()) {
        const int64_t row_index = i / args.seqlen_k, col = i % args.seqlen_k;
        const QueryRow r = query_row(args, row_index);
        if (!contains(r.keys, col)) continue;
        Real cap_slope;
        score_at(args, r, col, &cap_slope);
        naive.ds[i] *= cap_slope;
    }
}

static fa_status per_head(const fa_forward_args &args, const fa_per_head &gradient, const double *sums) {
    if (!gradient.data) return FA_OK;
    const int64_t elements = axis_size(gradient.stride_b, args.batch) * args.heads_q;
    return launch("naive_per_head", naive_per_head, PerHead{args, gradient, sums}, elements, fa_stream(&args));
}

// out_j = factor * sum_i matrix_ij in_i, over the query heads that share the key head
template <typename Real>
__global__ void __launch_bounds__(kNaiveThreads)
    naive_sum_rows(const __grid_constant__ Product<Real> product, int64_t elements) {
    const fa_forward_args &args = product.args;
    const int64_t group = args.heads_q / args.heads_kv;
    for (int64_t i = first_index(); i < elements; i += index_step()) {
        const fa_place place = fa_place_of(i / product.width, args.heads_kv, args.seqlen_k);
        const int64_t d = i % product.width, col = place.part, h_kv = place.head, b = place.b;
        const fa_sequence seq = fa_sequence_at(&args, b);
        if (col >= seq.len_k) continue;
        Real sum = 0;
        for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h)
            for (int64_t row = 0; row < seq.len_q; ++row) {
                if (!contains(fa_visible_keys(&args, &seq, row), col)) continue;
                const int64_t at = fa_row_offset(&product.in, seq.batch_index, h, seq.row_q + row) + d;
                const Real w = product.matrix[((b * args.heads_q + h) * args.seqlen_q + row) * args.seqlen_k + col];
                if (w != 0) sum += w * load<Real>(product.in.data, args.dtype, at);
            }
        const int64_t at = fa_row_offset(&product.out, seq.batch_index, h_kv, seq.row_k + col) + d;
        store(product.out.data, args.dtype, at, product.factor * sum);
    }
}

template <typename Real>
static fa_status backward(const fa_backward_args &backward) {
    const fa_forward_args &args = backward.forward;
    const fa_bias &d_bias = backward.d_bias;
    const Naive<Real> naive = naive_of<Real>(backward, true);
    const int64_t rows = args.batch * args.heads_q * args.seqlen_q, entries = rows * args.seqlen_k;
    const int64_t keys = args.batch * args.heads_kv * args.seqlen_k;
    const cudaStream_t stream = fa_stream(&args);
    FA_CHECK(launch("naive_scores", naive_scores<Real>, naive, entries, stream));
    FA_CHECK(launch("naive_delta", naive_delta<Real>, naive, rows, stream));
    FA_CHECK(launch("naive_d_scores", naive_d_scores<Real>, naive, entries, stream));
    if (d_bias.data || backward.d_alibi_slopes.data)
        FA_CHECK(launch("naive_row_sums", naive_row_sums<Real>, naive, rows, stream));
    if (d_bias.data) {
        const int64_t elements = axis_size(d_bias.stride_b, args.batch) * axis_size(d_bias.stride_h, args.heads_q) *
                                 axis_size(d_bias.stride_q, args.seqlen_q) * axis_size(d_bias.stride_k, args.seqlen_k);
        FA_CHECK(launch("naive_d_bias", naive_d_bias<Real>, naive, elements, stream));
    }
    FA_CHECK(per_head(args, backward.d_alibi_slopes, naive.slope_sums));
    FA_CHECK(per_head(args, backward.d_sinks, naive.sink_sums));
    if (args.softcap > 0)
        FA_CHECK(launch("naive_through_softcap", naive_through_softcap<Real>, naive, entries, stream));
    const Real scale = static_cast<Real>(args.softmax_scale), kept_scale = static_cast<Real>(1 / (1 - args.dropout_p));
    const Product<Real> d_q = {args, naive.ds, args.k, backward.d_q, args.head_dim, scale};
    const Product<Real> d_k = {args, naive.ds, args.q, backward.d_k, args.head_dim, scale};
    const Product<Real> d_v = {args, naive.p, backward.d_o, backward.d_v, args.head_dim_v, kept_scale};
    FA_CHECK(launch("naive_sum_keys", naive_sum_keys<Real>, d_q, rows * d_q.width, stream));
    FA_CHECK(launch("naive_sum_rows", naive_sum_rows<Real>, d_k, keys * d_k.width, stream));
    return launch("naive_sum_rows", naive_sum_rows<Real>, d_v, keys * d_v.width, stream);
}

size_t fa_cuda_naive_backward_bytes(const fa_backward_args *args) {
    return args->forward.dtype == FA_FLOAT64 ? naive_of<double>(*args, true).bytes : naive_of<float>(*args, true).bytes;
}
fa_status fa_cuda_naive_backward(const fa_backward_args *args) {
    return args->forward.dtype == FA_FLOAT64 ? backward<double>(*args) : backward<float>(*args);
}
