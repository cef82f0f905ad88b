// Rows between memory and arithmetic: loading and storing in any dtype, packing panels for the micro-kernel, dropout.
#ifndef FA_ROWS_H
#define FA_ROWS_H

#include <math.h>
#include <string.h>

#include "cpu/cpu.h"
#include "philox.h"

#if FA_REAL_IS_DOUBLE
#define REAL_DTYPE FA_FLOAT64
#define real_log log
#define real_exp exp
enum { kTanhTerms = 19 }; // of the continued fraction, below |x| = 0.6
#else
#define REAL_DTYPE FA_FLOAT32
#define real_log logf
#define real_exp expf
enum { kTanhTerms = 9 };
#endif

static const real kLog2E = (real)1.4426950408889634;

static inline const char *element_at(const void *base, fa_dtype dtype, int64_t index) {
    return (const char *)base + index * fa_dtype_bytes(dtype);
}

// dst[0 ... n) = scale * src[0 ... n), then zeros up to `padded`.
static void load_row(real *dst, const void *src, int64_t n, int64_t padded, fa_dtype dtype, real scale) {
    int64_t i = 0;
    const vreal v_scale = v_set1(scale);
    if (dtype == REAL_DTYPE) {
        for (; i + kLanes <= n; i += kLanes) v_store(dst + i, v_mul(v_scale, v_load((const real *)src + i)));
#if !FA_REAL_IS_DOUBLE
    } else if (dtype == FA_FLOAT16) {
        for (; i + kLanes <= n; i += kLanes) v_store(dst + i, v_mul(v_scale, v_load_f16((const uint16_t *)src + i)));
    } else if (dtype == FA_BFLOAT16) {
        for (; i + kLanes <= n; i += kLanes) v_store(dst + i, v_mul(v_scale, v_load_bf16((const uint16_t *)src + i)));
    } else if (dtype == FA_FLOAT8_E4M3) {
        const vreal v_unit = v_set1(scale * 0x1p8F); // of v_load_e4m3
        for (; i + kLanes <= n; i += kLanes) v_store(dst + i, v_mul(v_unit, v_load_e4m3((const uint8_t *)src + i)));
#endif
    }
    for (; i < n; ++i) dst[i] = scale * (real)fa_load(src, dtype, i);
    for (; i < padded; ++i) dst[i] = 0;
}

// dst[0 ... n) = scale * src[0 ... n).
static void store_row(void *dst, const real *src, int64_t n, fa_dtype dtype, real scale) {
    int64_t i = 0;
    const vreal v_scale = v_set1(scale);
    if (dtype == REAL_DTYPE) {
        for (; i + kLanes <= n; i += kLanes) v_store((real *)dst + i, v_mul(v_scale, v_load(src + i)));
#if !FA_REAL_IS_DOUBLE
    } else if (dtype == FA_FLOAT16) {
        for (; i + kLanes <= n; i += kLanes) v_store_f16((uint16_t *)dst + i, v_mul(v_scale, v_load(src + i)));
    } else if (dtype == FA_BFLOAT16) {
        for (; i + kLanes <= n; i += kLanes) v_store_bf16((uint16_t *)dst + i, v_mul(v_scale, v_load(src + i)));
#endif
    }
    for (; i < n; ++i) fa_store(dst, dtype, i, scale * src[i]);
}

// Row `row` of a head of t: src[0 ... n), scaled.
static void store_tensor_row(const fa_tensor *t, fa_dtype dtype, int64_t batch_index, int64_t head, int64_t row,
                             const real *src, int64_t n, real scale) {
    const int64_t at = fa_row_offset(t, batch_index, head, row);
    store_row((char *)t->data + at * fa_dtype_bytes(dtype), src, n, dtype, scale);
}

// dst[0 ... n) = n elements that lie `stride` apart (0: one element for all).
static void load_strided(real *dst, const void *src, int64_t n, int64_t stride, fa_dtype dtype) {
    if (stride == 1) {
        load_row(dst, src, n, n, dtype, 1);
    } else {
        for (int64_t i = 0; i < n; ++i) dst[i] = (real)fa_load(src, dtype, i * stride);
    }
}

// keep[rows][ld] = kept_value where dropout keeps (row0 + i, col0 + j), 0 where it drops it.
// row0, col0 and cols are multiples of 16. One 16 x 16 tile at a time: 8 row pairs x 4 column quads are 32 Philox calls,
// side by side in the lanes of the loops below.
static void dropout_tile(real *keep, int64_t ld, const fa_forward_args *args, int64_t head, int64_t row0, int64_t rows,
                         int64_t col0, int64_t cols, real kept_value) {
    const uint64_t seed = (uint64_t)*args->dropout_seed;
    const uint32_t threshold = fa_dropout_threshold(args->dropout_p);
    for (int64_t i = 0; i < rows; i += 16) {
        for (int64_t j = 0; j < cols; j += 16) {
            uint32_t words[4][32];
            for (int lane = 0; lane < 32; ++lane) {
                uint32_t counter[4] = {fa_dropout_row_word(row0 + i) + (uint32_t)(lane >> 2),
                                       fa_dropout_col_word(col0 + j) + (uint32_t)(lane & 3), (uint32_t)head,
                                       args->dropout_offset};
                fa_philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
                for (int w = 0; w < 4; ++w) words[w][lane] = counter[w];
            }
            for (int64_t r = 0; r < fa_min(16, rows - i); ++r) {
                real *row = keep + (i + r) * ld + j;
                const uint32_t *left = &words[r >> 3][(r & 7) * 4], *right = left + 2 * 32; // columns 0-7, 8-15
                for (int64_t t = 0; t < 4; ++t) {
                    row[2 * t] = (left[t] & 0xFFFFu) >= threshold ? kept_value : 0;
                    row[2 * t + 1] = (left[t] >> 16) >= threshold ? kept_value : 0;
                    row[2 * t + 8] = (right[t] & 0xFFFFu) >= threshold ? kept_value : 0;
                    row[2 * t + 9] = (right[t] >> 16) >= threshold ? kept_value : 0;
                }
            }
        }
    }
}

// What dropout multiplies a kept entry by. The fused kernels apply it to sums, in float32: P itself stays exact where it is
// 1, which a bfloat16 P / (1 - p) would not.
static inline real kept_scale(const fa_forward_args *args) { return (real)(1 / (1 - args->dropout_p)); }

// The head's sink logit; -inf, which adds nothing, where there are none.
static inline real sink_of(const fa_forward_args *args, int64_t h) {
    return args->sinks.data ? (real)fa_load(args->sinks.data, args->sinks.dtype, h * args->sinks.stride_h) : -INFINITY;
}

// Values of one head over the batch: kept apart where the gradient has a batch axis, else summed in order.
static void store_per_head(const fa_forward_args *forward, const fa_per_head *gradient, const double *parts,
                           int64_t count) {
    for (int64_t h = 0; gradient->data && h < forward->heads_q; ++h) {
        double sum = 0;
        for (int64_t b = 0; b < forward->batch; ++b) {
            if (gradient->stride_b) sum = 0;
            for (int64_t part = 0; part < count; ++part) sum += parts[(b * forward->heads_q + h) * count + part];
            if (gradient->stride_b)
                fa_store(gradient->data, gradient->dtype, b * gradient->stride_b + h * gradient->stride_h, sum);
        }
        if (!gradient->stride_b) fa_store(gradient->data, gradient->dtype, h * gradient->stride_h, sum);
    }
}

#endif
