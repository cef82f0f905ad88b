// Where a sequence lies and which keys a row sees: every mask but the bias is an interval [lo, hi) of keys, and both ends
// grow with the row.
#ifndef FA_SEQUENCE_H
#define FA_SEQUENCE_H

#include "flash_attention.h"
#include "host_device.h"
#include "sizes.h"

typedef struct fa_sequence {
    int64_t batch_index;  // along the batch axis of q, k, v, o: 0 where sequences are packed
    int64_t row_q, row_k; // first row in that batch entry
    int64_t len_q, len_k;
} fa_sequence;

// Rows [cu_seqlens[b], cu_seqlens[b + 1]), cut to the tensor's total and to the longest length.
static FA_HOST_DEVICE void fa_packed_rows(const int32_t *cu_seqlens, int64_t b, int64_t total, int64_t longest,
                                          int64_t *row, int64_t *length) {
    *row = fa_clamp(cu_seqlens[b], 0, total);
    *length = fa_min(fa_clamp(cu_seqlens[b + 1], *row, total) - *row, longest);
}

// Lengths are read here, where they lie, and cut to the tensors: on a GPU nothing has checked them before.
static FA_HOST_DEVICE fa_sequence fa_sequence_at(const fa_forward_args *args, int64_t b) {
    fa_sequence seq = {b, 0, 0, args->seqlen_q, args->seqlen_k};
    if (args->cu_seqlens_q) {
        seq.batch_index = 0;
        fa_packed_rows(args->cu_seqlens_q, b, args->total_q, args->seqlen_q, &seq.row_q, &seq.len_q);
        fa_packed_rows(args->cu_seqlens_k, b, args->total_k, args->seqlen_k, &seq.row_k, &seq.len_k);
    }
    if (args->seqlens_q) seq.len_q = fa_clamp(args->seqlens_q[b], 0, args->seqlen_q);
    if (args->seqlens_k) seq.len_k = fa_clamp(args->seqlens_k[b], 0, args->seqlen_k);
    return seq;
}

typedef struct fa_interval {
    int64_t lo, hi; // empty iff lo >= hi; 0 <= lo, hi <= len_k
} fa_interval;

static FA_HOST_DEVICE fa_interval fa_visible_keys(const fa_forward_args *args, const fa_sequence *seq, int64_t row) {
    const int64_t center = row + seq->len_k - seq->len_q;
    fa_interval keys = {0, seq->len_k};
    if (args->causal && center + 1 < keys.hi) keys.hi = center + 1;
    if (args->window_right >= 0 && args->window_right < keys.hi - center - 1) keys.hi = center + args->window_right + 1;
    if (args->window_left >= 0 && args->window_left < center) keys.lo = center - args->window_left;
    if (keys.hi < 0) keys.hi = 0;
    if (keys.lo > seq->len_k) keys.lo = seq->len_k;
    return keys;
}

// The rows that see a key of [key0, key1): what lies between may see other keys, too, but none outside sees these.
static FA_HOST_DEVICE fa_interval fa_seeing_rows(const fa_forward_args *args, const fa_sequence *seq, int64_t key0,
                                                 int64_t key1) {
    const int64_t row0 = key0 - (seq->len_k - seq->len_q), row1 = row0 + key1 - key0; // rows at the keys' positions
    fa_interval rows = {0, seq->len_q};
    if (args->window_right >= 0 && args->window_right < row0) rows.lo = row0 - args->window_right;
    if (args->causal && row0 > rows.lo) rows.lo = row0;
    if (args->window_left >= 0 && args->window_left < rows.hi - row1) rows.hi = row1 + args->window_left;
    if (rows.hi < 0) rows.hi = 0;
    return rows;
}

// First element of row `row` of head `head`, batch entry `batch_index`, in elements from data.
static FA_HOST_DEVICE int64_t fa_row_offset(const fa_tensor *t, int64_t batch_index, int64_t head, int64_t row) {
    return batch_index * t->stride_b + head * t->stride_h + row * t->stride_l;
}

#endif
