// The naive forward pass: scores, softmax, o.
#include "cuda/naive.cuh"

template <typename Real>
__global__ void __launch_bounds__(kNaiveThreads)
    naive_softmax(const __grid_constant__ Naive<Real> naive, int64_t rows) {
    const fa_forward_args &args = naive.backward.forward;
    for (int64_t i = first_index(); i < rows; i += index_step()) {
        const QueryRow r = query_row(args, i);
        if (!r.is_inside) continue;
        Real *p = naive.p + i * args.seqlen_k;
        const Softmax<Real> softmax = softmax_row(args, r, p);
        store(args.lse.data, fa_lse_dtype(&args), q_offset(args.lse, r), softmax.max + log_of(softmax.sum));
        const ScoreRule<Real> rule(args, r.seq, r.b, r.h);
        for (int64_t col = r.keys.lo; col < r.keys.hi; ++col)
            if (!rule.keeps(r.row, col)) p[col] = 0;
    }
}

template <typename Real>
static fa_status forward(const fa_forward_args &args) {
    const Naive<Real> naive = naive_of<Real>({args}, false);
    const int64_t rows = args.batch * args.heads_q * args.seqlen_q;
    const cudaStream_t stream = fa_stream(&args);
    FA_CHECK(launch("naive_scores", naive_scores<Real>, naive, rows * args.seqlen_k, stream));
    FA_CHECK(launch("naive_softmax", naive_softmax<Real>, naive, rows, stream));
    const Product<Real> o = {args,   naive.p,         args.v,
                             args.o, args.head_dim_v, static_cast<Real>(1 / (1 - args.dropout_p))};
    return launch("naive_sum_keys", naive_sum_keys<Real>, o, rows * o.width, stream);
}

size_t fa_cuda_naive_forward_bytes(const fa_forward_args *args) {
    const fa_backward_args given = {*args};
    return args->dtype == FA_FLOAT64 ? naive_of<double>(given, false).bytes : naive_of<float>(given, false).bytes;
}
fa_status fa_cuda_naive_forward(const fa_forward_args *args) {
    return args->dtype == FA_FLOAT64 ? forward<double>(*args) : forward<float>(*args);
}
