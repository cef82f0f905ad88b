// Operands laid out for the micro-kernel, once per call and shared by all tiles. An operand holds kDepth steps of a
// contraction (operand_*.h), so a tensor is packed for the axis it is contracted along:
//
//   along    rows of operands along head_dim                  the left factor of q k^T
//   panels   kMicroCols such rows, transposed                 the right factor of q k^T
//   down     rows of head_dim, kDepth rows to an operand      the right factor of p v
//
// Each sequence starts at a multiple of kMicroCols, so that no panel and no operand holds rows of two sequences.
#ifndef FA_PACKING_H
#define FA_PACKING_H

#include "cpu/kernels/micro.h"
#include "cpu/kernels/rows.h"

enum { kPackRows = 256 }; // rows a packing task takes: a multiple of every kMicroCols

_Static_assert(sizeof(operand) == sizeof(real), "a packed tensor holds either");

// Reals are scaled as they are packed; bfloat16 would lose bits, so there the products are scaled.
static inline real pack_scale(real scale) { return kDepth == 1 ? scale : 1; }
static inline real product_scale(real scale) { return kDepth == 1 ? 1 : scale; }

typedef enum pack_side { kSideQ, kSideK } pack_side;

// Rows that one head takes, and the first row of sequence b among them.
static int64_t packed_rows(const fa_forward_args *args, pack_side side) {
    if (args->cu_seqlens_q)
        return fa_round_up(side == kSideQ ? args->total_q : args->total_k, kMicroCols) + args->batch * kMicroCols;
    return args->batch * fa_round_up(side == kSideQ ? args->seqlen_q : args->seqlen_k, kMicroCols);
}
static int64_t packed_first_row(const fa_forward_args *args, pack_side side, int64_t b) {
    if (args->cu_seqlens_q)
        return ((side == kSideQ ? args->cu_seqlens_q : args->cu_seqlens_k)[b] / kMicroCols + b) * kMicroCols;
    return b * fa_round_up(side == kSideQ ? args->seqlen_q : args->seqlen_k, kMicroCols);
}

typedef struct packed {
    void *data;
    int64_t head_stride; // elements
    int64_t row_stride;  // elements; row r of a head is at r * row_stride, and so is the panel or operand it begins
} packed;

static packed packed_take(fa_arena *arena, const fa_forward_args *args, pack_side side, int64_t heads,
                          int64_t row_stride) {
    const int64_t head_stride = packed_rows(args, side) * row_stride;
    void *data = fa_take(arena, (size_t)(heads * head_stride) * sizeof(real));
    return (packed){data, head_stride, row_stride};
}

static inline real *packed_at(const packed *p, int64_t head, int64_t row) {
    return (real *)p->data + head * p->head_stride + row * p->row_stride;
}
static inline operand *operands_at(const packed *p, int64_t head, int64_t row) {
    return (operand *)p->data + head * p->head_stride + row * p->row_stride;
}

// One row of `width` elements as operands along it, zero-filled up to `units` operands.
static void load_along(operand *dst, const void *src, int64_t width, int64_t units, fa_dtype dtype, real scale) {
#if FA_BF16_OPERANDS
    (void)dtype, (void)scale; // bfloat16 alone comes here, unscaled
    memcpy(dst, src, (size_t)width * sizeof(uint16_t));
    memset((uint16_t *)dst + width, 0, (size_t)(2 * units - width) * sizeof(uint16_t));
#else
    load_row(dst, src, width, units, dtype, scale);
#endif
}

// Rows [row0, row0 + n) of a head of sequence b.
typedef struct pack_source {
    const fa_forward_args *args;
    const fa_tensor *tensor;
    pack_side side;
    int64_t b, head, row0, n, width;
    fa_sequence seq;
    const fa_tensor
        *lse; // where not NULL, a row whose lse is -inf is read as zeros: it takes no gradient, not even NaN
} pack_source;

static const double kZeroRow[FA_MAX_HEAD_DIM];

static const char *source_row(const pack_source *src, int64_t row) {
    const int64_t seq_row = src->side == kSideQ ? src->seq.row_q : src->seq.row_k;
    if (src->lse) {
        const int64_t lse_at = fa_row_offset(src->lse, src->seq.batch_index, src->head, seq_row + row);
        if (((const real *)src->lse->data)[lse_at] == -INFINITY) return (const char *)kZeroRow;
    }
    const int64_t offset = fa_row_offset(src->tensor, src->seq.batch_index, src->head, seq_row + row);
    return element_at(src->tensor->data, src->args->dtype, offset);
}

// Where the rows of src stand in a packed tensor.
static operand *pack_target(const packed *dst, const pack_source *src) {
    return operands_at(dst, src->head, packed_first_row(src->args, src->side, src->b) + src->row0);
}

// out: where the first row goes; row r goes row_stride operands further on for each row before it.
static void pack_along(operand *out, int64_t row_stride, const pack_source *src, real scale) {
    for (int64_t r = 0; r < src->n; ++r)
        load_along(out + r * row_stride, source_row(src, src->row0 + r), src->width, row_stride, src->args->dtype,
                   scale);
}

// kMicroCols rows of operands, transposed: units x kMicroCols.
static void transpose_panel(operand *out, const operand *rows, int64_t stride, int64_t units) {
    for (int64_t r0 = 0; r0 < kMicroCols; r0 += kLanes)
        for (int64_t u0 = 0; u0 < units; u0 += kLanes)
            v_transpose(out + u0 * kMicroCols + r0, kMicroCols, rows + r0 * stride + u0, stride,
                        fa_min(kLanes, units - u0));
}

// Panels of depth_units(width) x kMicroCols operands, one after the other; the last one's missing rows are zero.
// scratch: kMicroCols x round_up(depth_units(width), kLanes) operands.
static void pack_panels(operand *out, const pack_source *src, operand *scratch) {
    const int64_t units = depth_units(src->width), stride = fa_round_up(units, kLanes);
    for (int64_t row = 0; row < src->n; row += kMicroCols) {
        const int64_t n = fa_min(kMicroCols, src->n - row);
        for (int64_t r = 0; r < n; ++r)
            load_along(scratch + r * stride, source_row(src, src->row0 + row + r), src->width, stride, src->args->dtype,
                       1);
        memset(scratch + n * stride, 0, (size_t)((kMicroCols - n) * stride) * sizeof(operand));
        transpose_panel(out + row * units, scratch, stride, units);
    }
}

// `kDepth` rows of `width` elements as operands down the columns, zero-filled up to `units` columns.
static void load_down(operand *dst, const char *const *rows, int64_t width, int64_t units, fa_dtype dtype) {
#if FA_BF16_OPERANDS
    const uint16_t *row0 = (const uint16_t *)rows[0], *row1 = (const uint16_t *)rows[1];
    (void)dtype;
    for (int64_t c = 0; c < width; ++c) dst[c] = row0[c] | (uint32_t)row1[c] << 16;
    memset(dst + width, 0, (size_t)(units - width) * sizeof(operand));
#else
    load_row(dst, rows[0], width, units, dtype, 1);
#endif
}

// row0 is even; columns past width, and the second half of an odd last row's operands, are zero.
static void pack_down(operand *out, int64_t row_stride, const pack_source *src) {
#if FA_BF16_OPERANDS
    for (int64_t r = 0; r < src->n; r += 2, out += 2 * row_stride) {
        const char *rows[2] = {source_row(src, src->row0 + r), (const char *)kZeroRow};
        if (r + 1 < src->n) rows[1] = source_row(src, src->row0 + r + 1);
        load_down(out, rows, src->width, 2 * row_stride, src->args->dtype);
    }
#else
    pack_along(out, row_stride, src, 1);
#endif
}

#endif
