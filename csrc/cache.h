// Where the tokens of a key/value cache lie, and which of them a query sees.
#ifndef FA_CACHE_H
#define FA_CACHE_H

#include "flash_attention.h"
#include "host_device.h"
#include "sequence.h"
#include "sizes.h"

typedef struct fa_cached_sequence {
    int32_t start; // position of q's row 0; later tokens are new. Negative where q has more rows than there are keys
    int32_t len_k; // tokens that a query may see, new ones included
} fa_cached_sequence;

// Of a length, which is cut to the pages: on a GPU nothing has checked it before.
static FA_HOST_DEVICE fa_cached_sequence fa_cached_sequence_of(const fa_kvcache_args *args, int32_t given) {
    const int32_t capacity = (int32_t)(args->max_pages * args->page_size), seqlen_q = (int32_t)args->seqlen_q;
    const int32_t cut = given < capacity ? given : capacity, length = cut > 0 ? cut : 0;
    const int32_t longer = length + seqlen_q < capacity ? length + seqlen_q : capacity;
    const fa_cached_sequence seq = {args->k.data ? length : length - seqlen_q, args->k.data ? longer : length};
    return seq;
}

static FA_HOST_DEVICE fa_cached_sequence fa_cached_sequence_at(const fa_kvcache_args *args, int64_t b) {
    return fa_cached_sequence_of(args, args->cache_seqlens[b]); // lengths are read where they lie
}

// The keys that row i of q may see; of those from seq->start on only such as fa_tree_shows.
static FA_HOST_DEVICE fa_interval fa_cached_keys(const fa_kvcache_args *args, const fa_cached_sequence *seq,
                                                 int64_t i) {
    const int32_t center = seq->start + (int32_t)i;
    int32_t lo = 0, hi = seq->len_k;
    if (args->causal && !args->tree_mask && center + 1 < hi) hi = center + 1;
    if (args->window_right >= 0 && args->window_right < hi - center - 1) hi = center + (int32_t)args->window_right + 1;
    if (args->window_left >= 0 && args->window_left < center) lo = center - (int32_t)args->window_left;
    const fa_interval keys = {lo < seq->len_k ? lo : seq->len_k, hi > 0 ? hi : 0};
    return keys;
}

// Whether row i sees the key of a position, as far as tree_mask has a say.
static FA_HOST_DEVICE int fa_tree_shows(const fa_kvcache_args *args, const fa_cached_sequence *seq, int64_t b,
                                        int64_t i, int64_t position) {
    const int64_t j = position - seq->start;
    if (!args->tree_mask || j < 0) return 1;
    return args->tree_mask[b * args->tree_mask_stride_b + i * args->seqlen_q + j] != 0;
}

// The page of a token; -1 where the table names none that exists.
static FA_HOST_DEVICE int64_t fa_page_of(const fa_kvcache_args *args, int64_t b, int64_t token) {
    if (!args->page_table) return b;
    const int64_t page = args->page_table[b * args->page_table_stride + token / args->page_size];
    return page >= 0 && page < args->pages ? page : -1;
}

// First element of a token's row of a head of a cache, in elements from data; of a page >= 0.
static FA_HOST_DEVICE int64_t fa_cache_offset(const fa_kvcache_args *args, const fa_tensor *cache, int64_t page,
                                              int64_t head, int64_t token) {
    return fa_row_offset(cache, page, head, token % args->page_size);
}

#endif
