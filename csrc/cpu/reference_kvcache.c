// Attention over a key/value cache, one scalar float64 operation after the other: what the other kernels are held against.
#include <math.h>

#include "cache.h"
#include "cpu/cpu.h"

static double per_head(const fa_per_head *t, int64_t b, int64_t h, double absent) {
    return t->data ? fa_load(t->data, t->dtype, b * t->stride_b + h * t->stride_h) : absent;
}

// x[0 ... head_dim): a row of q or k, rotated by its position.
static void load_rotated(double *x, const fa_kvcache_args *args, const fa_tensor *t, int64_t b, int64_t h, int64_t i,
                         int64_t position) {
    const fa_rotary *rotary = &args->rotary;
    const int64_t at = fa_row_offset(t, b, h, i), pairs = rotary->cos ? rotary->dim / 2 : 0;
    for (int64_t d = 0; d < args->head_dim; ++d) x[d] = fa_load(t->data, args->dtype, at + d);
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const double cosine = fa_load(rotary->cos, rotary->dtype, position * pairs + pair);
        const double sine = fa_load(rotary->sin, rotary->dtype, position * pairs + pair);
        double *first = x + (rotary->interleaved ? 2 * pair : pair);
        double *second = x + (rotary->interleaved ? 2 * pair + 1 : pair + pairs);
        const double a = *first, c = *second;
        *first = a * cosine - c * sine;
        *second = a * sine + c * cosine;
    }
}

static int64_t cached_row(const fa_kvcache_args *args, const fa_tensor *cache, int64_t b, int64_t h_kv, int64_t token) {
    return fa_cache_offset(args, cache, fa_page_of(args, b, token), h_kv, token);
}

static double cached(const fa_kvcache_args *args, const fa_tensor *cache, int64_t row, int64_t d, double descale) {
    return fa_load(cache->data, args->cache_dtype, row + d) * descale;
}

static void append(const fa_kvcache_args *args, int64_t b, int64_t h_kv, int64_t i) {
    const int64_t token = fa_cached_sequence_at(args, b).start + i;
    const int64_t k_row = cached_row(args, &args->k_cache, b, h_kv, token);
    const int64_t v_row = cached_row(args, &args->v_cache, b, h_kv, token), v_at = fa_row_offset(&args->v, b, h_kv, i);
    double k[FA_MAX_HEAD_DIM];
    load_rotated(k, args, &args->k, b, h_kv, i, token);
    for (int64_t d = 0; d < args->head_dim; ++d)
        fa_store(args->k_cache.data, args->cache_dtype, k_row + d, k[d] / per_head(&args->k_descale, b, h_kv, 1));
    for (int64_t d = 0; d < args->head_dim_v; ++d)
        fa_store(args->v_cache.data, args->cache_dtype, v_row + d,
                 fa_load(args->v.data, args->dtype, v_at + d) / per_head(&args->v_descale, b, h_kv, 1));
}

// s[j] of the keys of an interval; -inf where tree_mask hides one.
static void score_row(double *s, const fa_kvcache_args *args, const fa_cached_sequence *seq, int64_t b, int64_t h,
                      int64_t i, fa_interval keys) {
    const int64_t h_kv = h / (args->heads_q / args->heads_kv);
    const double descale = per_head(&args->k_descale, b, h_kv, 1), slope = per_head(&args->alibi_slopes, b, h, 0);
    double q[FA_MAX_HEAD_DIM];
    load_rotated(q, args, &args->q, b, h, i, seq->start + i);
    for (int64_t j = keys.lo; j < keys.hi; ++j) {
        s[j] = -INFINITY;
        if (!fa_tree_shows(args, seq, b, i, j)) continue;
        const int64_t row = cached_row(args, &args->k_cache, b, h_kv, j);
        double dot = 0;
        for (int64_t d = 0; d < args->head_dim; ++d) dot += q[d] * cached(args, &args->k_cache, row, d, descale);
        s[j] = args->softmax_scale * dot;
        if (args->softcap > 0) s[j] = args->softcap * tanh(s[j] / args->softcap);
        s[j] -= slope * fabs((double)(seq->start + i - j));
    }
}

static void attend_row(const fa_kvcache_args *args, int64_t b, int64_t h, int64_t i) {
    const fa_cached_sequence seq = fa_cached_sequence_at(args, b);
    const fa_interval keys = fa_cached_keys(args, &seq, i);
    const int64_t h_kv = h / (args->heads_q / args->heads_kv), o_row = fa_row_offset(&args->o, b, h, i);
    const double descale = per_head(&args->v_descale, b, h_kv, 1), sink = per_head(&args->sinks, 0, h, -INFINITY);
    double *s = args->workspace, max = sink, sum = 0, o[FA_MAX_HEAD_DIM] = {0};
    score_row(s, args, &seq, b, h, i, keys);
    for (int64_t j = keys.lo; j < keys.hi; ++j)
        if (s[j] > max) max = s[j];
    if (max == -INFINITY) max = 0; // no key: every term of the sum is 0, unless a score is NaN
    if (args->sinks.data) sum += exp(sink - max);
    for (int64_t j = keys.lo; j < keys.hi; ++j) {
        if (!fa_tree_shows(args, &seq, b, i, j)) continue; // what is hidden may be NaN
        const int64_t row = cached_row(args, &args->v_cache, b, h_kv, j);
        const double p = exp(s[j] - max);
        sum += p;
        for (int64_t d = 0; d < args->head_dim_v; ++d) o[d] += p * cached(args, &args->v_cache, row, d, descale);
    }
    for (int64_t d = 0; d < args->head_dim_v; ++d)
        fa_store(args->o.data, args->dtype, o_row + d, sum == 0 ? 0 : o[d] / sum);
    if (args->lse.data)
        fa_store(args->lse.data, args->dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32,
                 fa_row_offset(&args->lse, b, h, i), max + log(sum)); // log(0) = -inf
}

static size_t workspace_bytes(const fa_kvcache_args *args) {
    return sizeof(double) * (size_t)(args->max_pages * args->page_size); // scores of one row
}

static void run(const fa_kvcache_args *args) {
    for (int64_t b = 0; args->k.data && b < args->batch; ++b)
        for (int64_t h_kv = 0; h_kv < args->heads_kv; ++h_kv)
            for (int64_t i = 0; i < args->seqlen_q; ++i) append(args, b, h_kv, i);
    for (int64_t b = 0; b < args->batch; ++b)
        for (int64_t h = 0; h < args->heads_q; ++h)
            for (int64_t i = 0; i < args->seqlen_q; ++i) attend_row(args, b, h, i);
}

const fa_cpu_kvcache fa_reference_kvcache = {workspace_bytes, run};
