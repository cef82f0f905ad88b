// Operands laid out for the micro-kernel, once per call and shared by all tiles: a whole tensor as `real`, either as rows
// or as transposed panels of kMicroCols rows. Each sequence starts at a multiple of kMicroCols, so that no panel holds
// rows of two sequences.
#ifndef FA_PACKING_H
#define FA_PACKING_H

#include "cpu/kernels/rows.h"

enum { kPackRows = 256 }; // rows a packing task takes: a multiple of every kMicroCols

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
    real *data;
    int64_t head_stride; // elements
    int64_t row_stride;  // elements; row r of a head, or the panel that begins with row r, is at r * row_stride
} packed;

static packed packed_take(fa_arena *arena, const fa_forward_args *args, pack_side side, int64_t heads,
                          int64_t row_stride) {
    const int64_t head_stride = packed_rows(args, side) * row_stride;
    real *data = fa_take(arena, (size_t)(heads * head_stride) * sizeof(real));
    return (packed){data, head_stride, row_stride};
}

static inline real *packed_at(const packed *p, int64_t head, int64_t row) {
    return p->data + head * p->head_stride + row * p->row_stride;
}

// Packs rows [row0, row0 + n) of a head of sequence b as panels, row0 a multiple of kMicroCols.
// scratch: kMicroCols x round_up(width, kLanes) elements.
static void pack_panels(const packed *dst, const fa_forward_args *args, const fa_tensor *src, pack_side side,
                        const fa_sequence *seq, int64_t b, int64_t head, int64_t row0, int64_t n, int64_t width,
                        real *scratch) {
    const int64_t first = packed_first_row(args, side, b), seq_row = side == kSideQ ? seq->row_q : seq->row_k;
    for (int64_t r = row0; r < row0 + n; r += kMicroCols) {
        const int64_t offset = fa_row_offset(src, seq->batch_index, head, seq_row + r);
        pack_transposed(packed_at(dst, head, first + r), scratch, src, args->dtype,
                        element_at(src->data, args->dtype, offset), fa_min(kMicroCols, row0 + n - r), width);
    }
}

// Packs the same rows as rows of dst->row_stride elements, scaled and zero-filled past width.
static void pack_rows(const packed *dst, const fa_forward_args *args, const fa_tensor *src, pack_side side,
                      const fa_sequence *seq, int64_t b, int64_t head, int64_t row0, int64_t n, int64_t width, real scale) {
    const int64_t first = packed_first_row(args, side, b), seq_row = side == kSideQ ? seq->row_q : seq->row_k;
    for (int64_t r = row0; r < row0 + n; ++r) {
        const int64_t offset = fa_row_offset(src, seq->batch_index, head, seq_row + r);
        load_row(packed_at(dst, head, first + r), element_at(src->data, args->dtype, offset), width, dst->row_stride,
                 args->dtype, scale);
    }
}

#endif
