// Rows that belong to no sequence: past a padded sequence's length, or past the last packed one. No kernel visits them.
#include "cuda/device.cuh"

enum { kFillThreads = 128, kFillParts = 8 }; // parts: blocks that share the rows of one head

struct Outside { // (batches, heads, rows, width): rows from `first` on are outside
    fa_tensor t;
    fa_dtype dtype;
    int64_t batches, heads, rows, width;
    const int32_t *first; // one for each batch entry, or the one of all
    double value;
};

__global__ void __launch_bounds__(kFillThreads) fill_outside(const __grid_constant__ Outside p) {
    const fa_place place = fa_place_of(blockIdx.x, p.heads, kFillParts);
    const int64_t first = fa_clamp(p.first[place.b], 0, p.rows) * p.width;
    for (int64_t i = first + place.part * kFillThreads + threadIdx.x; i < p.rows * p.width;
         i += kFillParts * kFillThreads)
        store(p.t.data, p.dtype, fa_row_offset(&p.t, place.b, place.head, i / p.width) + i % p.width, p.value);
}

static fa_status fill(const fa_forward_args *args, bool keys, const fa_tensor &t, fa_dtype dtype, int64_t heads,
                      int64_t width, double value) {
    const int32_t *cu_seqlens = keys ? args->cu_seqlens_k : args->cu_seqlens_q;
    const int32_t *seqlens = keys ? args->seqlens_k : args->seqlens_q;
    if (!cu_seqlens && !seqlens) return FA_OK;
    Outside p = {t, dtype, args->batch, heads, keys ? args->seqlen_k : args->seqlen_q, width, seqlens, value};
    if (cu_seqlens) p.batches = 1, p.rows = keys ? args->total_k : args->total_q, p.first = cu_seqlens + args->batch;
    if (p.rows == 0) return FA_OK;
    return fa_launch("fill_outside", fill_outside, p.batches * heads * kFillParts, kFillThreads, 0, fa_stream(args), p);
}

fa_status fa_cuda_fill_padding(const fa_forward_args *args) {
    FA_CHECK(fill(args, false, args->o, args->dtype, args->heads_q, args->head_dim_v, 0));
    return fill(args, false, args->lse, fa_lse_dtype(args), args->heads_q, 1, -INFINITY);
}

fa_status fa_cuda_fill_gradient_padding(const fa_backward_args *args) {
    const fa_forward_args *forward = &args->forward;
    FA_CHECK(fill(forward, false, args->d_q, forward->dtype, forward->heads_q, forward->head_dim, 0));
    FA_CHECK(fill(forward, true, args->d_k, forward->dtype, forward->heads_kv, forward->head_dim, 0));
    return fill(forward, true, args->d_v, forward->dtype, forward->heads_kv, forward->head_dim_v, 0);
}
