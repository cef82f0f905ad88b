// The formula of flash_attention.h, one scalar float64 operation after the other: what the other kernels are held against.
#include <math.h>
#include <string.h>

#include "cpu/cpu.h"
#include "philox.h"

// One query row: where it stands and what softmax makes of it.
typedef struct row_state {
    const fa_forward_args *args;
    fa_sequence seq;
    int64_t b, h, h_kv, i;
    fa_interval keys;
    double *s;       // [seqlen_k] scores
    double *capped;  // [seqlen_k] tanh(s / softcap), before bias and ALiBi
    double max, sum; // P = e^(s - max) / sum; lse = max + ln sum
} row_state;

static double at(const fa_forward_args *args, const fa_tensor *t, int64_t batch_index, int64_t head, int64_t row,
                 int64_t d) {
    return fa_load(t->data, args->dtype, fa_row_offset(t, batch_index, head, row) + d);
}
static void put(const fa_forward_args *args, const fa_tensor *t, int64_t batch_index, int64_t head, int64_t row,
                int64_t d, double x) {
    fa_store(t->data, args->dtype, fa_row_offset(t, batch_index, head, row) + d, x);
}

static double per_head(const fa_per_head *t, int64_t b, int64_t h, double absent) {
    return t->data ? fa_load(t->data, t->dtype, b * t->stride_b + h * t->stride_h) : absent;
}

static double distance(const row_state *row, int64_t j) {
    return fabs((double)(row->i + row->seq.len_k - row->seq.len_q - j));
}

static double kept(const row_state *row, int64_t j) { // dropout: 0 or 1 / (1 - p)
    const fa_forward_args *args = row->args;
    if (args->dropout_p == 0) return 1;
    const int keeps =
        fa_dropout_keeps((uint64_t)*args->dropout_seed, args->dropout_offset,
                         (uint32_t)(row->b * args->heads_q + row->h), row->i, j, fa_dropout_threshold(args->dropout_p));
    return keeps ? 1 / (1 - args->dropout_p) : 0;
}

static double key_dot(const row_state *row, const fa_tensor *a, const fa_tensor *b, int64_t j, int64_t width) {
    double sum = 0;
    for (int64_t d = 0; d < width; ++d)
        sum += at(row->args, a, row->seq.batch_index, row->h, row->seq.row_q + row->i, d) *
               at(row->args, b, row->seq.batch_index, row->h_kv, row->seq.row_k + j, d);
    return sum;
}

static void score_row(row_state *row) {
    const fa_forward_args *args = row->args;
    const fa_bias *bias = &args->bias;
    double max = per_head(&args->sinks, 0, row->h, -INFINITY), sum = 0;
    for (int64_t j = row->keys.lo; j < row->keys.hi; ++j) {
        double s = args->softmax_scale * key_dot(row, &args->q, &args->k, j, args->head_dim);
        row->capped[j] = args->softcap > 0 ? tanh(s / args->softcap) : 0;
        if (args->softcap > 0) s = args->softcap * row->capped[j];
        if (bias->data)
            s += fa_load(bias->data, bias->dtype,
                         row->b * bias->stride_b + row->h * bias->stride_h + row->i * bias->stride_q +
                             j * bias->stride_k);
        if (args->alibi_slopes.data) s -= per_head(&args->alibi_slopes, row->b, row->h, 0) * distance(row, j);
        row->s[j] = s;
        if (s > max) max = s;
    }
    if (max == -INFINITY) max = 0; // no key, or only -inf scores: every term of the sum is 0, unless a score is NaN
    for (int64_t j = row->keys.lo; j < row->keys.hi; ++j) sum += exp(row->s[j] - max);
    if (args->sinks.data) sum += exp(per_head(&args->sinks, 0, row->h, 0) - max);
    row->max = max, row->sum = sum;
}

static double probability(const row_state *row, int64_t j) {
    return row->sum == 0 ? 0 : exp(row->s[j] - row->max) / row->sum;
}

// Calls visit for every row of every sequence.
static void for_each_row(const fa_forward_args *args, double *s, double *capped,
                         void (*visit)(row_state *row, const void *context), const void *context) {
    for (int64_t b = 0; b < args->batch; ++b) {
        const fa_sequence seq = fa_sequence_at(args, b);
        for (int64_t h = 0; h < args->heads_q; ++h)
            for (int64_t i = 0; i < seq.len_q; ++i) {
                row_state row = {
                    args, seq,    b, h, h / (args->heads_q / args->heads_kv), i, fa_visible_keys(args, &seq, i),
                    s,    capped, 0, 0};
                visit(&row, context);
            }
    }
}

static void forward_row(row_state *row, const void *context) {
    (void)context;
    const fa_forward_args *args = row->args;
    const fa_sequence *seq = &row->seq;
    score_row(row);
    for (int64_t d = 0; d < args->head_dim_v; ++d) {
        double o = 0;
        for (int64_t j = row->keys.lo; j < row->keys.hi; ++j)
            o +=
                probability(row, j) * kept(row, j) * at(args, &args->v, seq->batch_index, row->h_kv, seq->row_k + j, d);
        put(args, &args->o, seq->batch_index, row->h, seq->row_q + row->i, d, o);
    }
    fa_store(args->lse.data, fa_lse_dtype(args),
             fa_row_offset(&args->lse, seq->batch_index, row->h, seq->row_q + row->i),
             row->max + log(row->sum)); // log(0) = -inf
}

static size_t forward_workspace_bytes(const fa_forward_args *args) {
    return 2 * sizeof(double) * (size_t)args->seqlen_k;
}

static void forward_run(const fa_forward_args *args) {
    double *s = args->workspace;
    for_each_row(args, s, s + args->seqlen_k, forward_row, NULL);
}

const fa_cpu_forward fa_reference_forward = {forward_workspace_bytes, forward_run};

// ---- backward: every gradient is a float64 sum in the workspace, converted once at the end --------------------------

typedef struct sums {
    const fa_backward_args *args;
    double *s, *capped;
    double *d_k, *d_v;          // [B][Hkv][rows][width]; packed: [Hkv][total_k][width]
    double *d_bias;             // [B or 1][Hq or 1][Lq or 1][Lk or 1]
    double *d_slopes, *d_sinks; // [B or 1][Hq], [Hq]
    int64_t batches, rows_k;    // of d_k, d_v
    int64_t bias_size[4];
    size_t bytes;
} sums;

static sums sums_at(const fa_backward_args *args, char *base) {
    const fa_forward_args *forward = &args->forward;
    const fa_bias *d_bias = &args->d_bias;
    fa_arena arena = {base, 0};
    sums t = {.args = args};
    t.batches = forward->cu_seqlens_k ? 1 : forward->batch;
    t.rows_k = forward->cu_seqlens_k ? forward->total_k : forward->seqlen_k;
    const int64_t heads_rows = t.batches * forward->heads_kv * t.rows_k;
    const int64_t sizes[4] = {forward->batch, forward->heads_q, forward->seqlen_q, forward->seqlen_k};
    const int64_t strides[4] = {d_bias->stride_b, d_bias->stride_h, d_bias->stride_q, d_bias->stride_k};
    int64_t bias_elements = d_bias->data ? 1 : 0;
    for (int axis = 0; axis < 4; ++axis) {
        t.bias_size[axis] = strides[axis] ? sizes[axis] : 1;
        bias_elements *= t.bias_size[axis];
    }
    t.s = fa_take(&arena, sizeof(double) * (size_t)forward->seqlen_k);
    t.capped = fa_take(&arena, sizeof(double) * (size_t)forward->seqlen_k);
    t.d_k = fa_take(&arena, sizeof(double) * (size_t)(heads_rows * forward->head_dim));
    t.d_v = fa_take(&arena, sizeof(double) * (size_t)(heads_rows * forward->head_dim_v));
    t.d_bias = fa_take(&arena, sizeof(double) * (size_t)bias_elements);
    t.d_slopes = fa_take(&arena, sizeof(double) * (size_t)(forward->batch * forward->heads_q));
    t.d_sinks = fa_take(&arena, sizeof(double) * (size_t)forward->heads_q);
    t.bytes = arena.used_bytes;
    return t;
}

static int64_t bias_index(const sums *t, const row_state *row, int64_t j) {
    const int64_t *size = t->bias_size;
    return ((row->b % size[0] * size[1] + row->h % size[1]) * size[2] + row->i % size[2]) * size[3] + j % size[3];
}

static void backward_row(row_state *row, const void *context) {
    const sums *t = context;
    const fa_backward_args *args = t->args;
    const fa_forward_args *forward = row->args;
    const fa_sequence *seq = &row->seq;
    const int64_t row_q = seq->row_q + row->i;
    score_row(row);
    double delta = 0;
    for (int64_t d = 0; d < forward->head_dim_v; ++d) {
        double o = 0;
        for (int64_t j = row->keys.lo; j < row->keys.hi; ++j)
            o += probability(row, j) * kept(row, j) *
                 at(forward, &forward->v, seq->batch_index, row->h_kv, seq->row_k + j, d);
        delta += o * at(forward, &args->d_o, seq->batch_index, row->h, row_q, d);
    }
    if (args->d_lse.data)
        delta -= fa_load(args->d_lse.data, fa_lse_dtype(forward),
                         fa_row_offset(&args->d_lse, seq->batch_index, row->h, row_q));

    double *ds = row->s; // each score is read once more, then gives way to its gradient
    for (int64_t j = row->keys.lo; j < row->keys.hi; ++j) {
        const double p = probability(row, j), keep = kept(row, j);
        const int64_t k_at = (seq->batch_index * forward->heads_kv + row->h_kv) * t->rows_k + seq->row_k + j;
        for (int64_t d = 0; d < forward->head_dim_v; ++d)
            t->d_v[k_at * forward->head_dim_v + d] +=
                p * keep * at(forward, &args->d_o, seq->batch_index, row->h, row_q, d);
        ds[j] = p * (keep * key_dot(row, &args->d_o, &forward->v, j, forward->head_dim_v) - delta);
        if (args->d_bias.data) t->d_bias[bias_index(t, row, j)] += ds[j];
        t->d_slopes[row->b * forward->heads_q + row->h] -= ds[j] * distance(row, j);
        ds[j] *= forward->softmax_scale * (1 - row->capped[j] * row->capped[j]);
        for (int64_t d = 0; d < forward->head_dim; ++d)
            t->d_k[k_at * forward->head_dim + d] +=
                ds[j] * at(forward, &forward->q, seq->batch_index, row->h, row_q, d);
    }
    for (int64_t d = 0; d < forward->head_dim; ++d) {
        double d_q = 0;
        for (int64_t j = row->keys.lo; j < row->keys.hi; ++j)
            d_q += ds[j] * at(forward, &forward->k, seq->batch_index, row->h_kv, seq->row_k + j, d);
        put(forward, &args->d_q, seq->batch_index, row->h, row_q, d, d_q);
    }
    if (forward->sinks.data && row->sum != 0)
        t->d_sinks[row->h] -= exp(per_head(&forward->sinks, 0, row->h, 0) - row->max) / row->sum * delta;
}

static size_t backward_workspace_bytes(const fa_backward_args *args) { return sums_at(args, NULL).bytes; }

static void store_extras(const fa_backward_args *args, const sums *t) {
    const fa_forward_args *forward = &args->forward;
    const fa_bias *d_bias = &args->d_bias;
    int64_t index = 0;
    if (d_bias->data)
        for (int64_t b = 0; b < t->bias_size[0]; ++b)
            for (int64_t h = 0; h < t->bias_size[1]; ++h)
                for (int64_t i = 0; i < t->bias_size[2]; ++i)
                    for (int64_t j = 0; j < t->bias_size[3]; ++j)
                        fa_store(d_bias->data, d_bias->dtype,
                                 b * d_bias->stride_b + h * d_bias->stride_h + i * d_bias->stride_q +
                                     j * d_bias->stride_k,
                                 t->d_bias[index++]);
    for (int64_t h = 0; h < forward->heads_q; ++h) {
        const fa_per_head *d_slopes = &args->d_alibi_slopes, *d_sinks = &args->d_sinks;
        if (d_sinks->data) fa_store(d_sinks->data, d_sinks->dtype, h * d_sinks->stride_h, t->d_sinks[h]);
        double over_batch = 0;
        for (int64_t b = 0; b < forward->batch; ++b) {
            over_batch += t->d_slopes[b * forward->heads_q + h];
            if (d_slopes->data && d_slopes->stride_b)
                fa_store(d_slopes->data, d_slopes->dtype, b * d_slopes->stride_b + h * d_slopes->stride_h,
                         t->d_slopes[b * forward->heads_q + h]);
        }
        if (d_slopes->data && !d_slopes->stride_b)
            fa_store(d_slopes->data, d_slopes->dtype, h * d_slopes->stride_h, over_batch);
    }
}

static void backward_run(const fa_backward_args *args) {
    const fa_forward_args *forward = &args->forward;
    const sums t = sums_at(args, forward->workspace);
    memset(forward->workspace, 0, t.bytes);
    for_each_row(forward, t.s, t.capped, backward_row, &t);
    for (int64_t b = 0; b < t.batches; ++b)
        for (int64_t h = 0; h < forward->heads_kv; ++h)
            for (int64_t j = 0; j < t.rows_k; ++j) {
                const int64_t k_at = (b * forward->heads_kv + h) * t.rows_k + j;
                for (int64_t d = 0; d < forward->head_dim; ++d)
                    put(forward, &args->d_k, b, h, j, d, t.d_k[k_at * forward->head_dim + d]);
                for (int64_t d = 0; d < forward->head_dim_v; ++d)
                    put(forward, &args->d_v, b, h, j, d, t.d_v[k_at * forward->head_dim_v + d]);
            }
    store_extras(args, &t);
}

const fa_cpu_backward fa_reference_backward = {backward_workspace_bytes, backward_run};
