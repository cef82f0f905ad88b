// Rows of a key/value cache and of what comes to it: where they lie, how they are rotated, and how new ones are stored.
#ifndef FA_CACHE_ROWS_H
#define FA_CACHE_ROWS_H

#include "cache.h"
#include "cpu/kernels/packing.h"

enum { kAppendRows = 64 }; // rows of k and v that one task stores

static inline real per_head(const fa_per_head *t, int64_t b, int64_t h, real absent) {
    return t->data ? (real)fa_load(t->data, t->dtype, b * t->stride_b + h * t->stride_h) : absent;
}

// rows[0 ... n): the rows of tokens [token0, token0 + n) of a head of a cache.
static void find_rows(const char **rows, const fa_kvcache_args *args, const fa_tensor *cache, int64_t b, int64_t h_kv,
                      int64_t token0, int64_t n) {
    const int64_t stride_bytes = cache->stride_l * fa_dtype_bytes(args->cache_dtype);
    for (int64_t i = 0; i < n;) {
        const int64_t token = token0 + i, page = fa_page_of(args, b, token);
        const int64_t run = fa_min(n - i, args->page_size - token % args->page_size);
        const char *row = element_at(cache->data, args->cache_dtype, fa_cache_offset(args, cache, page, h_kv, token));
        for (int64_t end = i + run; i < end; ++i, row += stride_bytes) rows[i] = row;
    }
}

// x[0 ... head_dim), in place. The trigonometric rows are widened as they are used: dim / 2 elements a row.
static void rotate_row(real *x, const fa_rotary *rotary, int64_t position) {
    const int64_t pairs = rotary->dim / 2;
    real cosines[FA_MAX_HEAD_DIM / 2], sines[FA_MAX_HEAD_DIM / 2];
    load_row(cosines, element_at(rotary->cos, rotary->dtype, position * pairs), pairs, pairs, rotary->dtype, 1);
    load_row(sines, element_at(rotary->sin, rotary->dtype, position * pairs), pairs, pairs, rotary->dtype, 1);
    const int64_t step = rotary->interleaved ? 2 : 1, second = rotary->interleaved ? 1 : pairs;
    for (int64_t i = 0; i < pairs; ++i) {
        const real a = x[i * step], b = x[i * step + second];
        x[i * step] = a * cosines[i] - b * sines[i];
        x[i * step + second] = a * sines[i] + b * cosines[i];
    }
}

// Row i of k or v of sequence b, as a row of a cache.
static void append_row(const fa_kvcache_args *args, const fa_tensor *from, const fa_tensor *cache,
                       const fa_rotary *rotary, int64_t b, int64_t h_kv, int64_t i, int64_t width, real descale) {
    const int64_t token = fa_cached_sequence_at(args, b).start + i;
    const char *row;
    real x[FA_MAX_HEAD_DIM];
    load_row(x, element_at(from->data, args->dtype, fa_row_offset(from, b, h_kv, i)), width, width, args->dtype, 1);
    if (rotary) rotate_row(x, rotary, token);
    for (int64_t d = 0; args->cache_dtype == FA_FLOAT8_E4M3 && d < width; ++d) x[d] /= descale;
    find_rows(&row, args, cache, b, h_kv, token, 1);
    store_row((char *)row, x, width, args->cache_dtype, 1);
}

static void append_task(void *arg, int64_t task, int32_t worker) {
    const fa_kvcache_args *args = arg;
    (void)worker;
    const int64_t rows = args->batch * args->heads_kv * args->seqlen_q;
    for (int64_t row = task * kAppendRows; row < fa_min(rows, (task + 1) * kAppendRows); ++row) {
        const fa_place at = fa_place_of(row, args->heads_kv, args->seqlen_q);
        append_row(args, &args->k, &args->k_cache, args->rotary.cos ? &args->rotary : NULL, at.b, at.head, at.part,
                   args->head_dim, per_head(&args->k_descale, at.b, at.head, 1));
        append_row(args, &args->v, &args->v_cache, NULL, at.b, at.head, at.part, args->head_dim_v,
                   per_head(&args->v_descale, at.b, at.head, 1));
    }
}

static void append_tokens(const fa_kvcache_args *args) {
    if (!args->k.data) return;
    fa_parallel_for(&args->workers, fa_ceil_div(args->batch * args->heads_kv * args->seqlen_q, kAppendRows),
                    append_task, (void *)args);
}

#endif
