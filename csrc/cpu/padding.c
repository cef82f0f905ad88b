// Rows that belong to no sequence: past a padded sequence's length, or past the last packed one. No kernel visits them.
#include "cpu/cpu.h"

static void fill_rows(const fa_tensor *t, fa_dtype dtype, int64_t batch_index, int64_t heads, int64_t row0,
                      int64_t row1, int64_t width, double value) {
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t row = row0; row < row1; ++row) {
            const int64_t at = fa_row_offset(t, batch_index, h, row);
            for (int64_t d = 0; d < width; ++d) fa_store(t->data, dtype, at + d, value);
        }
}

// Calls fill_rows on the rows outside every sequence, on q's side or on k's.
static void fill_outside(const fa_forward_args *args, int keys, const fa_tensor *t, fa_dtype dtype, int64_t heads,
                         int64_t width, double value) {
    const int32_t *cu_seqlens = keys ? args->cu_seqlens_k : args->cu_seqlens_q;
    const int32_t *seqlens = keys ? args->seqlens_k : args->seqlens_q;
    if (cu_seqlens)
        fill_rows(t, dtype, 0, heads, cu_seqlens[args->batch], keys ? args->total_k : args->total_q, width, value);
    for (int64_t b = 0; seqlens && b < args->batch; ++b)
        fill_rows(t, dtype, b, heads, seqlens[b], keys ? args->seqlen_k : args->seqlen_q, width, value);
}

void fa_cpu_fill_padding(const fa_forward_args *args) {
    fill_outside(args, 0, &args->o, args->dtype, args->heads_q, args->head_dim_v, 0);
    fill_outside(args, 0, &args->lse, fa_lse_dtype(args), args->heads_q, 1, -INFINITY);
}

void fa_cpu_fill_gradient_padding(const fa_backward_args *args) {
    const fa_forward_args *forward = &args->forward;
    fill_outside(forward, 0, &args->d_q, forward->dtype, forward->heads_q, forward->head_dim, 0);
    fill_outside(forward, 1, &args->d_k, forward->dtype, forward->heads_kv, forward->head_dim, 0);
    fill_outside(forward, 1, &args->d_v, forward->dtype, forward->heads_kv, forward->head_dim_v, 0);
}
