// Attention of a few new tokens over a key/value cache. Source: Dao et al., "Flash-Decoding" (2023).
//
//   first          new keys, rotated, and values go to the cache                                          cache_rows.h
//   then, per task (b, h_kv, tile of rows, split of keys):
//     for each block of keys that some row of the tile sees
//       s = q k^T, modified, masked;  p = e^(s - m');  o = o e^(m - m') + p v
//   then, where a sequence has several splits, per row: their o, m, l are joined in the order of the splits
//
// A key/value head's rows are those of all query heads that read it, query by query: row r is head r % group of query
// r / group. Up to kStreamMost rows the tile is memory's: keys and values are read once, where they lie (stream.h), while
// those of the next block are fetched. More rows are the multiplier's: blocks are packed first, for the micro-kernel.
//
// A sequence is split by its own length alone, so that its result is the same to the bit in any batch, with any number of
// workers, and whatever num_splits asks for.
#ifndef FA_KVCACHE_KERNEL_H
#define FA_KVCACHE_KERNEL_H

#include "cpu/kernels/cache_rows.h"
#include "cpu/kernels/fused_forward.h"
#include "cpu/kernels/stream.h"

enum {
    kStreamMost = 4 * kStreamRows, // beyond it, transposing keys is cheaper than adding up lanes
    kAheadBytes = 16384,           // distance at which rows are asked for: 0.2 us at 80 GB/s, twice what memory takes
    kAheadRows = 64,               // and its most, in rows
    kTileRows = 128,               // rows over which packing a block of kBlockN keys is spread
    kSplitKeys = 2 * kBlockN,      // fewest keys of a split
    kMostSplits = 128,
    kSplitRows = 2048, // most rows of all splits of a key/value head: what the workspace holds
    kMergeRows = 16,   // rows that one task joins
};

typedef struct cache_scratch {  // of one worker
    operand *q;                 // [tile_rows][q_units]
    real *acc_o;                // [tile_rows][o_stride]
    real *s;                    // [kStreamRows][kBlockN]
    operand *p;                 // [kStreamRows][kBlockN / kDepth]; s itself where an operand is a real
    real *row;                  // [kBlockN]
    operand *pack;              // [kMicroCols][q_units]
    operand *k_block, *v_block; // kBlockN keys, packed
    real *row_max, *row_sum;    // [tile_rows]
} cache_scratch;

typedef struct cache_plan {
    const fa_kvcache_args *args;
    int64_t group, rows;         // query heads of a key/value head; times seqlen_q
    int64_t tile_rows, tiles;    // of a key/value head
    int64_t most_splits, splits; // that a length may have, and that one has
    int64_t q_units;             // operands of a row of q, in whole vectors
    int64_t o_stride;            // head_dim_v in whole panels, which are whole column groups
    int streams;
    real unit;                 // what a cached element is multiplied by, besides its descale
    real *part_o;              // [B * Hkv * rows][splits][o_stride]
    real *part_max, *part_sum; // [B * Hkv * rows][splits]
    char *scratch;
    size_t scratch_bytes, workspace_bytes;
} cache_plan;

static cache_scratch cache_scratch_at(const cache_plan *plan, int32_t worker, size_t *bytes) {
    fa_arena arena = {plan->scratch ? plan->scratch + (size_t)worker * plan->scratch_bytes : NULL, 0};
    const size_t rows = (size_t)fa_round_up(plan->tile_rows, kStreamRows), packed_keys = plan->streams ? 0 : kBlockN;
    cache_scratch scratch;
    scratch.q = fa_take(&arena, rows * (size_t)plan->q_units * sizeof(operand));
    scratch.acc_o = fa_take(&arena, rows * (size_t)plan->o_stride * sizeof(real));
    scratch.s = fa_take(&arena, kStreamRows * kBlockN * sizeof(real));
    scratch.p = kDepth == 1 ? (operand *)scratch.s : fa_take(&arena, kStreamRows * kBlockN / kDepth * sizeof(operand));
    scratch.row = fa_take(&arena, kBlockN * sizeof(real));
    scratch.pack = fa_take(&arena, plan->streams ? 0 : (size_t)(kMicroCols * plan->q_units) * sizeof(operand));
    scratch.k_block = fa_take(&arena, packed_keys * (size_t)depth_units(plan->args->head_dim) * sizeof(operand));
    scratch.v_block = fa_take(&arena, packed_keys / kDepth * (size_t)plan->o_stride * sizeof(operand));
    scratch.row_max = fa_take(&arena, rows * sizeof(real));
    scratch.row_sum = fa_take(&arena, rows * sizeof(real));
    if (bytes) *bytes = arena.used_bytes;
    return scratch;
}

static cache_plan cache_plan_of(const fa_kvcache_args *args) {
    cache_plan plan = {.args = args, .group = args->heads_q / args->heads_kv};
    plan.rows = plan.group * args->seqlen_q;
    plan.streams = plan.rows <= kStreamMost;
    plan.tile_rows = plan.streams ? kStreamMost : kTileRows;
    plan.tiles = fa_ceil_div(plan.rows, plan.tile_rows);
    const int64_t limit = fa_clamp(kSplitRows / fa_max(plan.rows, 1), 1, kMostSplits);
    plan.most_splits = fa_clamp(fa_ceil_div(args->max_pages * args->page_size, kSplitKeys), 1, limit);
    plan.q_units = fa_round_up(depth_units(args->head_dim), kLanes);
    plan.o_stride = fa_round_up(args->head_dim_v, kMicroCols);
    plan.unit = plan.streams ? 1 / stream_unit(args->cache_dtype) : 1;
    fa_arena arena = {args->workspace, 0};
    const size_t parts =
        plan.most_splits > 1 ? (size_t)(args->batch * args->heads_kv * plan.rows * plan.most_splits) : 0;
    plan.part_o = fa_take(&arena, parts * (size_t)plan.o_stride * sizeof(real));
    plan.part_max = fa_take(&arena, parts * sizeof(real));
    plan.part_sum = fa_take(&arena, parts * sizeof(real));
    cache_scratch_at(&plan, 0, &plan.scratch_bytes);
    plan.scratch = fa_take(&arena, plan.scratch_bytes * (size_t)fa_worker_count(&args->workers));
    plan.workspace_bytes = arena.used_bytes;
    return plan;
}

// The keys that some row of a sequence sees, cut into splits.
typedef struct cache_span {
    fa_cached_sequence seq;
    int64_t lo, hi, split_keys, splits;
} cache_span;

static cache_span cache_span_of(const cache_plan *plan, int64_t b) {
    const fa_kvcache_args *args = plan->args;
    cache_span span = {fa_cached_sequence_at(args, b), 0, 0, kSplitKeys, 1};
    span.lo = fa_cached_keys(args, &span.seq, 0).lo;
    span.hi = fa_max(span.lo, fa_cached_keys(args, &span.seq, args->seqlen_q - 1).hi);
    const int64_t keys = span.hi - span.lo, limit = fa_clamp(kSplitRows / plan->rows, 1, kMostSplits);
    const int64_t wanted = fa_clamp(fa_ceil_div(keys, kSplitKeys), 1, limit);
    span.split_keys = fa_max(kSplitKeys, fa_round_up(fa_ceil_div(keys, wanted), kBlockN));
    span.splits = fa_max(1, fa_ceil_div(keys, span.split_keys));
    return span;
}

// Rows [r0, r0 + n) of a key/value head against the keys [lo, hi) that some of them see.
typedef struct cache_tile {
    const cache_plan *plan;
    const cache_scratch *scratch;
    fa_cached_sequence seq;
    int64_t b, h_kv, r0, n, lo, hi;
    real score_scale; // of products q.k, where q is not scaled as it is loaded
} cache_tile;

// Rows that kernels of whole strips touch.
static inline int64_t strip_end(int64_t n) { return n / kStreamRows * kStreamRows + stream_rows(n % kStreamRows); }
static inline int64_t query_of(const cache_plan *plan, int64_t r) { return r / plan->group; }
static inline int64_t head_of(const cache_plan *plan, int64_t h_kv, int64_t r) {
    return h_kv * plan->group + r % plan->group;
}

// The tile's rows of q, rotated and, where operands are reals, scaled. Rows that fill up the last strip are zeros.
static void load_queries(const cache_tile *tile, real scale) {
    const cache_plan *plan = tile->plan;
    const fa_kvcache_args *args = plan->args;
    real x[FA_MAX_HEAD_DIM + 2 * kLanes];
    for (int64_t r = 0; r < tile->n; ++r) {
        const int64_t i = query_of(plan, tile->r0 + r), h = head_of(plan, tile->h_kv, tile->r0 + r);
        const char *row = element_at(args->q.data, args->dtype, fa_row_offset(&args->q, tile->b, h, i));
        load_row(x, row, args->head_dim, plan->q_units * kDepth, args->dtype, scale);
        if (args->rotary.cos) rotate_row(x, &args->rotary, tile->seq.start + i);
        for (int64_t u = 0; u < plan->q_units; u += kLanes)
            v_store_operand(tile->scratch->q + r * plan->q_units + u, x + u * kDepth);
    }
    const int64_t missing = strip_end(tile->n) - tile->n;
    memset(tile->scratch->q + tile->n * plan->q_units, 0, (size_t)(missing * plan->q_units) * sizeof(operand));
}

// Products q.k of a row with n keys from n0 on -> scores, -inf where the row does not see the key; `columns` of them.
static void finish_cached_scores(const cache_tile *tile, real *s, int64_t r, int64_t n0, int64_t n, int64_t columns) {
    const cache_plan *plan = tile->plan;
    const fa_kvcache_args *args = plan->args;
    const int64_t i = query_of(plan, r), h = head_of(plan, tile->h_kv, r), start = tile->seq.start;
    const real slope = per_head(&args->alibi_slopes, tile->b, h, 0);
    const score_rule rule = {.seq = {.len_k = start}, .softcap = (real)args->softcap, .slope = slope};
    fa_interval keys = fa_cached_keys(args, &tile->seq, i);
    keys.hi = fa_min(keys.hi, n0 + n);
    for (int64_t c = 0; tile->score_scale != 1 && c < columns; c += kLanes)
        v_store(s + c, v_mul(v_load(s + c), v_set1(tile->score_scale)));
    if (rule.softcap > 0 || slope != 0) modify_scores(&rule, s, i, n0, columns, NULL, tile->scratch->row);
    mask_scores(s, n0, columns, keys);
    for (int64_t j = fa_max(n0, start); args->tree_mask && j < n0 + n; ++j)
        if (!fa_tree_shows(args, &tile->seq, tile->b, i, j)) s[j - n0] = -INFINITY;
}

// The softmax of n rows from r on of the tile; s and p have rows kBlockN apart, and `columns` of them.
static void soften_rows(const cache_tile *tile, int64_t r, int64_t n, int64_t n0, int64_t keys, int64_t columns) {
    const cache_scratch *scratch = tile->scratch;
    const int64_t o_stride = tile->plan->o_stride;
    for (int64_t i = 0; i < n; ++i) {
        finish_cached_scores(tile, scratch->s + i * kBlockN, tile->r0 + r + i, n0, keys, columns);
        softmax_row(scratch->s + i * kBlockN, scratch->p + i * kBlockN / kDepth, NULL, columns,
                    &scratch->row_max[r + i], &scratch->row_sum[r + i], scratch->acc_o + (r + i) * o_stride, o_stride);
    }
}

// ---- few rows: keys and values where they lie -----------------------------------------------------------------------

// Rows of a block, and those after it that are asked for while it is read.
typedef struct row_list {
    const char *rows[kBlockN + kAheadRows];
} row_list;

static stream_source source_of(row_list *list, const cache_tile *tile, const fa_tensor *cache, int64_t width,
                               int64_t n0) {
    const fa_kvcache_args *args = tile->plan->args;
    const int64_t bytes = fa_dtype_bytes(args->cache_dtype), n = fa_min(kBlockN, tile->hi - n0);
    stream_source source = {list->rows, NULL, cache->stride_l * bytes,
                            fa_clamp(kAheadBytes / (width * bytes), 1, kAheadRows)};
    if (n == kBlockN && n0 % args->page_size + n <= args->page_size) {
        find_rows(&source.base, args, cache, tile->b, tile->h_kv, n0, 1);
        source.list = NULL;
        return source;
    }
    const int64_t listed = fa_min(kBlockN + kAheadRows, tile->hi - n0);
    find_rows(list->rows, args, cache, tile->b, tile->h_kv, n0, listed);
    for (int64_t i = listed; i < kBlockN + kAheadRows; ++i) list->rows[i] = list->rows[n - 1];
    if (kDepth > 1 && n % kDepth) list->rows[n] = (const char *)kZeroRow; // of values, whose p is 0
    return source;
}

static void attend_streaming(const cache_tile *tile) {
    const cache_plan *plan = tile->plan;
    const fa_kvcache_args *args = plan->args;
    const cache_scratch *scratch = tile->scratch;
    row_list k_list, v_list;
    for (int64_t n0 = tile->lo; n0 < tile->hi; n0 += kBlockN) {
        const int64_t n = fa_min(kBlockN, tile->hi - n0);
        stream_source k = source_of(&k_list, tile, &args->k_cache, args->head_dim, n0);
        stream_source v = source_of(&v_list, tile, &args->v_cache, args->head_dim_v, n0);
        for (int64_t r = 0; r < tile->n; r += kStreamRows) {
            const int64_t rows = fa_min(kStreamRows, tile->n - r);
            const operand *q = scratch->q + r * plan->q_units;
            real *acc_o = scratch->acc_o + r * plan->o_stride;
            stream_scores(stream_rows(rows), args->cache_dtype, q, plan->q_units, &k, n, args->head_dim, scratch->s,
                          kBlockN);
            soften_rows(tile, r, rows, n0, n, fa_round_up(n, kMicroCols));
            stream_values(stream_rows(rows), args->cache_dtype, scratch->p, kBlockN / kDepth, &v, n, args->head_dim_v,
                          acc_o, plan->o_stride);
            k.ahead = v.ahead = 0; // the other strips find the block in the cache
        }
    }
#if FA_BF16_OPERANDS
    for (int64_t r = 0; r < tile->n; ++r)
        for (int64_t d = 0; d < plan->o_stride; d += kStep) v_order_columns(scratch->acc_o + r * plan->o_stride + d);
#endif
}

// ---- many rows: blocks packed for the micro-kernel ------------------------------------------------------------------

static void pack_block(const cache_tile *tile, int64_t n0, int64_t n) {
    const cache_plan *plan = tile->plan;
    const fa_kvcache_args *args = plan->args;
    const cache_scratch *scratch = tile->scratch;
    const int64_t units = depth_units(args->head_dim);
    const char *list[kBlockN + 1];
    find_rows(list, args, &args->k_cache, tile->b, tile->h_kv, n0, n);
    for (int64_t j = 0; j < n; j += kMicroCols) {
        for (int64_t r = 0; r < kMicroCols; ++r)
            load_along(scratch->pack + r * plan->q_units, j + r < n ? list[j + r] : (const char *)kZeroRow,
                       args->head_dim, plan->q_units, args->cache_dtype, 1);
        transpose_panel(scratch->k_block + j * units, scratch->pack, plan->q_units, units);
    }
    find_rows(list, args, &args->v_cache, tile->b, tile->h_kv, n0, n);
    list[n] = (const char *)kZeroRow;
    for (int64_t j = 0; j < n; j += kDepth)
        load_down(scratch->v_block + j / kDepth * plan->o_stride, list + j, args->head_dim_v, plan->o_stride,
                  args->cache_dtype);
}

static void attend_packed(const cache_tile *tile) {
    const cache_plan *plan = tile->plan;
    const fa_kvcache_args *args = plan->args;
    const cache_scratch *scratch = tile->scratch;
    const int64_t units = depth_units(args->head_dim);
    for (int64_t n0 = tile->lo; n0 < tile->hi; n0 += kBlockN) {
        const int64_t n = fa_min(kBlockN, tile->hi - n0);
        pack_block(tile, n0, n);
        for (int64_t r = 0; r < tile->n; r += kMicroRows) {
            const int64_t rows = fa_min(kMicroRows, tile->n - r), last = tile->r0 + r + rows - 1;
            const int64_t seen = fa_min(n, fa_cached_keys(args, &tile->seq, query_of(plan, last)).hi - n0);
            if (fa_cached_keys(args, &tile->seq, query_of(plan, tile->r0 + r)).lo - n0 >= seen) continue;
            const int64_t columns = fa_round_up(seen, kMicroCols);
            for (int64_t c = 0; c < columns; c += kMicroCols)
                micro_kernel(rows, units, scratch->q + r * plan->q_units, plan->q_units, 1,
                             scratch->k_block + c * units, kMicroCols, scratch->s + c, kBlockN, 0);
            soften_rows(tile, r, rows, n0, seen, columns);
            for (int64_t d = 0; d < plan->o_stride; d += kMicroCols)
                micro_kernel(rows, depth_units(seen), scratch->p, kBlockN / kDepth, 1, scratch->v_block + d,
                             plan->o_stride, scratch->acc_o + r * plan->o_stride + d, plan->o_stride, 1);
        }
    }
}

// ---- tasks ----------------------------------------------------------------------------------------------------------

// What `count` splits know of a row.
typedef struct row_parts {
    const real *o, *max, *sum; // o: o_stride apart
    int64_t count;
} row_parts;

// o and lse of row r, from the unnormalised sums of its splits in their order; the sink is one more term of l.
static void finish_cached_row(const cache_plan *plan, int64_t b, int64_t h_kv, int64_t r, const row_parts *parts) {
    const fa_kvcache_args *args = plan->args;
    const int64_t i = query_of(plan, r), h = head_of(plan, h_kv, r);
    const real sink = per_head(&args->sinks, 0, h, -INFINITY);
    real max = sink, sum = 0, o[FA_MAX_HEAD_DIM + 2 * kMicroCols] = {0};
    for (int64_t s = 0; s < parts->count; ++s)
        if (parts->max[s] > max) max = parts->max[s];
    if (max == -INFINITY) max = 0;
    if (args->sinks.data) sum = real_exp(sink - max);
    for (int64_t s = 0; s < parts->count; ++s) {
        if (parts->sum[s] == 0) continue; // it saw no key, and has no o
        const real weight = real_exp(parts->max[s] - max);
        sum += parts->sum[s] * weight;
        for (int64_t d = 0; d < plan->o_stride; d += kLanes)
            v_store(o + d, v_fma(v_set1(weight), v_load(parts->o + s * plan->o_stride + d), v_load(o + d)));
    }
    const real scale = per_head(&args->v_descale, b, h_kv, 1) * plan->unit;
    store_tensor_row(&args->o, args->dtype, b, h, i, o, args->head_dim_v, sum == 0 ? 0 : scale / sum);
    if (args->lse.data)
        ((real *)args->lse.data)[fa_row_offset(&args->lse, b, h, i)] = sum == 0 ? -INFINITY : max + real_log(sum);
}

static void attend_task(void *arg, int64_t task, int32_t worker) {
    const cache_plan *plan = arg;
    const fa_kvcache_args *args = plan->args;
    const fa_place place = fa_place_of(task, args->heads_kv, plan->tiles * plan->splits);
    const int64_t b = place.b, h_kv = place.head, split = place.part / plan->tiles;
    const cache_span span = cache_span_of(plan, b);
    if (split >= span.splits) return;
    const cache_scratch scratch = cache_scratch_at(plan, worker, NULL);
    const real scale = (real)args->softmax_scale * per_head(&args->k_descale, b, h_kv, 1) * plan->unit;
    cache_tile tile = {
        plan, &scratch, span.seq, b, h_kv, place.part % plan->tiles * plan->tile_rows, 0, 0, 0, product_scale(scale)};
    tile.n = fa_min(plan->tile_rows, plan->rows - tile.r0);
    const int64_t first = query_of(plan, tile.r0), last = query_of(plan, tile.r0 + tile.n - 1);
    const int64_t lo = span.lo + split * span.split_keys;
    tile.lo = fa_max(lo, fa_cached_keys(args, &span.seq, first).lo);
    tile.hi = fa_min(lo + span.split_keys, fa_cached_keys(args, &span.seq, last).hi);

    for (int64_t r = 0; r < tile.n; ++r) scratch.row_max[r] = -INFINITY, scratch.row_sum[r] = 0;
    if (tile.lo < tile.hi) {
        memset(scratch.acc_o, 0, (size_t)(strip_end(tile.n) * plan->o_stride) * sizeof(real));
        load_queries(&tile, pack_scale(scale));
        if (plan->streams)
            attend_streaming(&tile);
        else
            attend_packed(&tile);
    }
    for (int64_t r = 0; r < tile.n; ++r) {
        const row_parts own = {scratch.acc_o + r * plan->o_stride, &scratch.row_max[r], &scratch.row_sum[r], 1};
        const int64_t at = ((b * args->heads_kv + h_kv) * plan->rows + tile.r0 + r) * plan->splits + split;
        if (span.splits == 1) {
            finish_cached_row(plan, b, h_kv, tile.r0 + r, &own);
        } else {
            plan->part_max[at] = *own.max, plan->part_sum[at] = *own.sum;
            if (*own.sum != 0) memcpy(plan->part_o + at * plan->o_stride, own.o, (size_t)plan->o_stride * sizeof(real));
        }
    }
}

static void merge_task(void *arg, int64_t task, int32_t worker) {
    const cache_plan *plan = arg;
    const fa_kvcache_args *args = plan->args;
    (void)worker;
    const int64_t rows = args->batch * args->heads_kv * plan->rows;
    for (int64_t row = task * kMergeRows; row < fa_min(rows, (task + 1) * kMergeRows); ++row) {
        const fa_place at = fa_place_of(row, args->heads_kv, plan->rows);
        const int64_t first = row * plan->splits, splits = cache_span_of(plan, at.b).splits;
        const row_parts parts = {plan->part_o + first * plan->o_stride, plan->part_max + first, plan->part_sum + first,
                                 splits};
        if (splits > 1) finish_cached_row(plan, at.b, at.head, at.part, &parts);
    }
}

static size_t kvcache_workspace_bytes(const fa_kvcache_args *args) { return cache_plan_of(args).workspace_bytes; }

static void kvcache_run(const fa_kvcache_args *args) {
    cache_plan plan = cache_plan_of(args);
    append_tokens(args);
    if (args->batch * plan.rows == 0) return;
    plan.splits = 1;
    for (int64_t b = 0; b < args->batch; ++b) plan.splits = fa_max(plan.splits, cache_span_of(&plan, b).splits);
    const int64_t heads = args->batch * args->heads_kv;
    fa_parallel_for(&args->workers, heads * plan.tiles * plan.splits, attend_task, &plan);
    if (plan.splits > 1) fa_parallel_for(&args->workers, fa_ceil_div(heads * plan.rows, kMergeRows), merge_task, &plan);
}

#endif
