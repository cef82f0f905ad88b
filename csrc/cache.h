// Where the tokens of a key/value cache lie, and which of them a query sees.
#ifndef FA_CACHE_H
#define FA_CACHE_H

#include "flash_attention.h"
#include "host_device.h"
#include "sequence.h"
#include "sizes.h"

typedef struct fa_cached_sequence {
    int64_t
        start; // position of q's row 0; tokens from here on are new. Negative where q has more rows than there are keys
    int64_t len_k; // tokens that a query may see, new ones included
} fa_cached_sequence;

// Lengths are read here, where they lie, and cut to the pages: on a GPU nothing has checked them before.
static FA_HOST_DEVICE fa_cached_sequence fa_cached_sequence_at(const fa_kvcache_args *args, int64_t b) {
    const int64_t capacity = args->max_pages * args->page_size;
    const int64_t length = fa_clamp(args->cache_seqlens[b], 0, capacity);
    const int64_t start = args->k.data ? length : length - args->seqlen_q;
    const fa_cached_sequence seq = {start, args->k.data ? fa_min(length + args->seqlen_q, capacity) : length};
    return seq;
}

// The keys that row i of q may see; of those from seq->start on only such as fa_tree_shows.
static FA_HOST_DEVICE fa_interval fa_cached_keys(const fa_kvcache_args *args, const fa_cached_sequence *seq,
                                                 int64_t i) {
    const int64_t center = seq->start + i;
    fa_interval keys = {0, seq->len_k};
    if (args->causal && !args->tree_mask && center + 1 < keys.hi) keys.hi = center + 1;
    if (args->window_right >= 0 && args->window_right < keys.hi - center - 1) keys.hi = center + args->window_right + 1;
    if (args->window_left >= 0 && args->window_left < center) keys.lo = center - args->window_left;
    if (keys.hi < 0) keys.hi = 0;
    if (keys.lo > seq->len_k) keys.lo = seq->len_k;
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
