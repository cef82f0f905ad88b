// The two products of a few query rows with keys and values where they lie, each of which is read once, whatever its dtype:
//
//   stream_scores   s[rows][keys] = q k^T     a lane adds up every kLanes-th element of head_dim: kStreamVectors sums at once
//   stream_values   o[rows][columns] += p v   as the micro-kernel, with accumulators for the columns that the rows leave
//
// rows is 1, 2, 4 or kStreamRows. Pages are not seen here.
#ifndef FA_STREAM_H
#define FA_STREAM_H

#include "cpu/kernels/packing.h"

enum {
    kStreamRows = 8,
    kStep = kDepth * kLanes, // elements of a key that a vector holds
    kColumnVectors = kDepth, // accumulators of a column group, kStep columns
    kKeysAtOnce = 4,
};

// What the loads below leave of a value.
static inline real stream_unit(fa_dtype dtype) { return dtype == FA_FLOAT8_E4M3 ? (real)0x1p-8 : 1; }

// Where rows of keys or values lie: through pointers, or, where there are none, `stride` bytes apart, which is faster.
typedef struct stream_source {
    const char *const *list;
    const char *base;
    int64_t stride;
    int64_t ahead; // distance, in rows, at which they are asked for; there are pointers as far as that
} stream_source;

#define FA_ALWAYS_INLINE static inline __attribute__((always_inline))

#if !FA_BF16_OPERANDS
FA_ALWAYS_INLINE vreal stream_load(const void *p, const fa_dtype dtype) {
#if !FA_REAL_IS_DOUBLE
    if (dtype == FA_FLOAT16) return v_load_f16(p);
    if (dtype == FA_BFLOAT16) return v_load_bf16(p);
    if (dtype == FA_FLOAT8_E4M3) return v_load_e4m3(p);
#endif
    return (void)dtype, v_load(p);
}
#endif

// kStep elements along a row; of the last step only the `bytes` there are.
FA_ALWAYS_INLINE voperand stream_key(const char *p, const fa_dtype dtype) {
#if FA_BF16_OPERANDS
    return (void)dtype, v_load_operand((const operand *)p);
#else
    return stream_load(p, dtype);
#endif
}
FA_ALWAYS_INLINE voperand stream_last_key(const char *p, int64_t bytes, const fa_dtype dtype) {
    real copy[kLanes];
    v_copy_first(copy, p, bytes);
    return stream_key((const char *)copy, dtype);
}

// kStep columns of kDepth rows, from byte `at` of each row on.
FA_ALWAYS_INLINE void stream_value(voperand out[kColumnVectors], const char *const *rows, int64_t at,
                                   const fa_dtype dtype) {
#if FA_BF16_OPERANDS
    (void)dtype;
    v_load_down(out, rows[0] + at, rows[1] + at);
#else
    out[0] = stream_load(rows[0] + at, dtype);
#endif
}
FA_ALWAYS_INLINE void stream_last_value(voperand out[kColumnVectors], const char *const *rows, int64_t at,
                                        int64_t bytes, const fa_dtype dtype) {
    real copies[kDepth][kLanes];
    const char *pointers[kDepth];
    for (int i = 0; i < kDepth; ++i) {
        v_copy_first(copies[i], rows[i] + at, bytes);
        pointers[i] = (const char *)copies[i];
    }
    stream_value(out, pointers, 0, dtype);
}

FA_ALWAYS_INLINE const char *stream_row(const stream_source *source, int64_t j) {
    return source->list ? source->list[j] : source->base + j * source->stride;
}
// Fetches a line that will be read soon into the second-level cache, which has more misses under way than the first.
FA_ALWAYS_INLINE void stream_ahead(const char *row, int64_t at) {
    if (kLanes > 1 && at % 64 == 0) __builtin_prefetch(row + at, 0, 2);
}

// Sums of `keys` keys (at most kKeysAtOnce) and `rows` rows: sums[r * sums_stride + k], a lane each.
FA_ALWAYS_INLINE void stream_dots(const int rows, const int keys, const fa_dtype dtype, const operand *q,
                                  int64_t q_stride, const stream_source *k_rows, int64_t j, int64_t width, vreal *sums,
                                  const int sums_stride) {
    vreal acc[kStreamRows][kKeysAtOnce];
    const char *pointers[kKeysAtOnce], *coming[kKeysAtOnce];
    const int64_t bytes = fa_dtype_bytes(dtype), whole = width / kStep * kStep;
#pragma GCC unroll 8
    for (int k = 0; k < keys; ++k) {
        pointers[k] = stream_row(k_rows, j + k), coming[k] = stream_row(k_rows, j + k + k_rows->ahead);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) acc[r][k] = v_set1(0);
    }
    for (int64_t d = 0; d < whole; d += kStep) {
        voperand key[kKeysAtOnce];
#pragma GCC unroll 8
        for (int k = 0; k < keys; ++k) {
            key[k] = stream_key(pointers[k] + d * bytes, dtype);
            stream_ahead(coming[k], d * bytes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const voperand q_r = v_load_operand(q + r * q_stride + d / kDepth);
#pragma GCC unroll 8
            for (int k = 0; k < keys; ++k) acc[r][k] = v_dot(key[k], q_r, acc[r][k]);
        }
    }
    if (whole < width) {
#pragma GCC unroll 8
        for (int k = 0; k < keys; ++k) {
            const voperand key = stream_last_key(pointers[k] + whole * bytes, (width - whole) * bytes, dtype);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r)
                acc[r][k] = v_dot(key, v_load_operand(q + r * q_stride + whole / kDepth), acc[r][k]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < keys; ++k) sums[r * sums_stride + k] = acc[r][k];
}

// s: rows s_stride apart. k_rows has rows, any, up to a multiple of kStreamVectors of n.
FA_ALWAYS_INLINE void stream_scores_rows(const int rows, const fa_dtype dtype, const operand *q, int64_t q_stride,
                                         const stream_source *k_rows, int64_t n, int64_t width, real *s,
                                         int64_t s_stride) {
    const int keys = kStreamVectors / rows, at_once = keys < kKeysAtOnce ? keys : kKeysAtOnce;
    for (int64_t j = 0; j < n; j += keys) {
        vreal sums[kStreamVectors];
        real out[kStreamVectors];
#pragma GCC unroll 2
        for (int k = 0; k < keys; k += at_once)
            stream_dots(rows, at_once, dtype, q, q_stride, k_rows, j + k, width, sums + k, keys);
#pragma GCC unroll 8
        for (int i = 0; i < kStreamVectors; i += kLanes) v_store(out + i, v_hsums(sums + i));
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) memcpy(s + r * s_stride + j, out + r * keys, (size_t)keys * sizeof(real));
    }
}

// `groups` column groups from `column` on; tail_bytes: of the one group that is not whole, else 0.
FA_ALWAYS_INLINE void stream_values_groups(const int rows, const int groups, const fa_dtype dtype, const operand *p,
                                           int64_t p_stride, const stream_source *v_rows, int64_t units, int64_t column,
                                           int64_t tail_bytes, real *o, int64_t o_stride) {
    vreal acc[kStreamRows][8 * kColumnVectors];
    const int vectors = groups * kColumnVectors;
    const int64_t bytes = fa_dtype_bytes(dtype);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) acc[r][i] = v_load(o + r * o_stride + column + i * kLanes);
    for (int64_t unit = 0; unit < units; ++unit) {
        const char *row[kDepth], *coming[kDepth];
        for (int i = 0; i < kDepth; ++i) {
            row[i] = stream_row(v_rows, unit * kDepth + i);
            coming[i] = stream_row(v_rows, unit * kDepth + i + v_rows->ahead);
        }
#pragma GCC unroll 8
        for (int g = 0; g < groups; ++g) {
            voperand v[kColumnVectors];
            if (tail_bytes)
                stream_last_value(v, row, column * bytes, tail_bytes, dtype);
            else
                stream_value(v, row, (column + g * kStep) * bytes, dtype);
            for (int i = 0; i < kDepth; ++i) stream_ahead(coming[i], (column + g * kStep) * bytes);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
                for (int i = 0; i < kColumnVectors; ++i)
                    acc[r][g * kColumnVectors + i] =
                        v_dot(v[i], v_set1_operand(p[r * p_stride + unit]), acc[r][g * kColumnVectors + i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) v_store(o + r * o_stride + column + i * kLanes, acc[r][i]);
}

// o: rows o_stride apart, in whole column groups, in the order of stream_value's columns.
FA_ALWAYS_INLINE void stream_values_rows(const int rows, const fa_dtype dtype, const operand *p, int64_t p_stride,
                                         const stream_source *v_rows, int64_t n, int64_t width, real *o,
                                         int64_t o_stride) {
    const int most = kStreamVectors / rows / kColumnVectors; // groups whose accumulators are in registers
    const int64_t units = depth_units(n), whole = width / kStep * kStep, tail = (width - whole) * fa_dtype_bytes(dtype);
    int64_t column = 0;
#define FA_VALUES(GROUPS, TAIL)                                                                                        \
    stream_values_groups(rows, GROUPS, dtype, p, p_stride, v_rows, units, column, TAIL, o, o_stride)
    for (; most >= 8 && column + 8 * kStep <= whole; column += 8 * kStep) FA_VALUES(8, 0);
    for (; most >= 4 && column + 4 * kStep <= whole; column += 4 * kStep) FA_VALUES(4, 0);
    for (; most >= 2 && column + 2 * kStep <= whole; column += 2 * kStep) FA_VALUES(2, 0);
    for (; column < whole; column += kStep) FA_VALUES(1, 0);
    if (tail) FA_VALUES(1, tail);
#undef FA_VALUES
}

// The ladder from what is known when a call is made to what is known when this is compiled.
#if FA_BF16_OPERANDS
#define FA_STREAM_DTYPES(DTYPE, CALL) CALL(FA_BFLOAT16)
#elif FA_REAL_IS_DOUBLE
#define FA_STREAM_DTYPES(DTYPE, CALL) CALL(FA_FLOAT64)
#else
#define FA_STREAM_DTYPES(DTYPE, CALL)                                                                                  \
    switch (DTYPE) {                                                                                                   \
    case FA_FLOAT16: CALL(FA_FLOAT16); break;                                                                          \
    case FA_BFLOAT16: CALL(FA_BFLOAT16); break;                                                                        \
    case FA_FLOAT8_E4M3: CALL(FA_FLOAT8_E4M3); break;                                                                  \
    default: CALL(FA_FLOAT32); break;                                                                                  \
    }
#endif

// Rows of the kernel that serves n of them; of 0 none.
static inline int stream_rows(int64_t n) { return n > 4 ? 8 : n > 2 ? 4 : (int)n; }

static void stream_scores(int rows, fa_dtype dtype, const operand *q, int64_t q_stride, const stream_source *k_rows,
                          int64_t n, int64_t width, real *s, int64_t s_stride) {
#define FA_SCORES_OF(ROWS, DTYPE)                                                                                      \
    case ROWS: stream_scores_rows(ROWS, DTYPE, q, q_stride, k_rows, n, width, s, s_stride); break;
#define FA_SCORES(DTYPE)                                                                                               \
    switch (rows) { FA_SCORES_OF(1, DTYPE) FA_SCORES_OF(2, DTYPE) FA_SCORES_OF(4, DTYPE) FA_SCORES_OF(8, DTYPE) }
    (void)dtype;
    FA_STREAM_DTYPES(dtype, FA_SCORES)
#undef FA_SCORES
#undef FA_SCORES_OF
}

static void stream_values(int rows, fa_dtype dtype, const operand *p, int64_t p_stride, const stream_source *v_rows,
                          int64_t n, int64_t width, real *o, int64_t o_stride) {
#define FA_VALUES_OF(ROWS, DTYPE)                                                                                      \
    case ROWS: stream_values_rows(ROWS, DTYPE, p, p_stride, v_rows, n, width, o, o_stride); break;
#define FA_VALUES(DTYPE)                                                                                               \
    switch (rows) { FA_VALUES_OF(1, DTYPE) FA_VALUES_OF(2, DTYPE) FA_VALUES_OF(4, DTYPE) FA_VALUES_OF(8, DTYPE) }
    (void)dtype;
    FA_STREAM_DTYPES(dtype, FA_VALUES)
#undef FA_VALUES
#undef FA_VALUES_OF
}

#endif
