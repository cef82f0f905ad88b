#include "kvcache_problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/convert.h"

static double uniform(uint64_t tensor, uint64_t index) { // in [-1, 1), splitmix64
    uint64_t x = (tensor + 1) * 0x9E3779B97F4A7C15u + index * 0xD1B54A32D192ED03u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (double)((x ^ (x >> 31)) >> 11) * 0x1p-52 - 1;
}

int64_t kvcache_size(const kvcache_tensor *t) { return t->sizes[0] * t->sizes[1] * t->sizes[2] * t->sizes[3]; }

static int64_t offset_of(const kvcache_tensor *t, int64_t logical_index) {
    int64_t offset = 0;
    for (int axis = 3; axis >= 0; --axis) {
        offset += logical_index % t->sizes[axis] * t->strides[axis];
        logical_index /= t->sizes[axis];
    }
    return offset;
}

double kvcache_at(const kvcache_tensor *t, int64_t logical_index) {
    return fa_load(t->data, t->dtype, offset_of(t, logical_index));
}

static kvcache_tensor make_tensor(fa_dtype dtype, int64_t n0, int64_t heads, int64_t rows, int64_t width,
                                  bool token_major, placement where) {
    kvcache_tensor t = {NULL, dtype, {n0, heads, rows, width}, {heads * rows * width, rows * width, width, 1}};
    if (token_major) t.strides[1] = width, t.strides[2] = heads * width;
    t.data = guarded((size_t)(kvcache_size(&t) * fa_dtype_bytes(dtype)), (size_t)fa_dtype_bytes(dtype), where);
    return t;
}

enum { TENSOR_Q, TENSOR_K, TENSOR_V, TENSOR_K_CACHE, TENSOR_V_CACHE, TENSOR_ROTARY, TENSOR_HEADS, TENSOR_TREE };

static void fill(kvcache_tensor *t, uint64_t id, double magnitude) {
    for (int64_t i = 0; i < kvcache_size(t); ++i)
        fa_store(t->data, t->dtype, offset_of(t, i), magnitude * uniform(id, (uint64_t)i));
    guarded_protect(t->data, false);
}

int64_t kvcache_row(const kvcache_problem *p, const kvcache_tensor *cache, int b, int head, int64_t token) {
    const int64_t page_size = p->args.page_size;
    const int64_t page = p->pages ? p->pages[b * p->args.page_table_stride + token / page_size] : b;
    return page * cache->strides[0] + head * cache->strides[1] + token % page_size * cache->strides[2];
}

static void fill_cache(const kvcache_case *c, const kvcache_problem *p, const kvcache_tensor *cache, uint64_t id) {
    for (int b = 0; b < c->batch; ++b)
        for (int h = 0; h < p->args.heads_kv; ++h)
            for (int64_t token = 0; token < c->lengths[b]; ++token) {
                const int64_t row = kvcache_row(p, cache, b, h, token); // the same numbers for all who share it
                for (int64_t d = 0; d < cache->sizes[3]; ++d)
                    fa_store(cache->data, cache->dtype, row + d,
                             2 * uniform(id, (uint64_t)((token * 64 + h) * 1024 + d + (c->shared ? 0 : b << 26))));
            }
}

// Pages in a shuffled order; columns that hold no token name pages that do not exist.
static void make_pages(const kvcache_case *c, kvcache_problem *p, placement where) {
    fa_kvcache_args *args = &p->args;
    const int64_t spare = 2, stride = args->max_pages + 1, count = c->batch * args->max_pages;
    args->pages = count + spare, args->page_table_stride = stride;
    p->pages = guarded((size_t)(c->batch * stride) * sizeof *p->pages, sizeof *p->pages, where);
    int32_t *order = malloc((size_t)(args->pages + 1) * sizeof *order);
    for (int32_t i = 0; i < args->pages; ++i) {
        const int32_t j = (int32_t)((uniform(TENSOR_TREE + 1, (uint64_t)i) + 1) / 2 * (i + 1));
        order[i] = order[j], order[j] = i;
    }
    for (int b = 0; b < c->batch; ++b) {
        const int64_t tokens = c->lengths[b] + (c->append ? c->seqlen_q : 0);
        for (int64_t i = 0; i < stride; ++i) {
            const bool used = i * args->page_size < tokens && i < args->max_pages;
            p->pages[b * stride + i] = !used                 ? (i % 2 ? -1 : 1 << 30)
                                       : c->shared && i == 0 ? order[0]
                                                             : order[b * args->max_pages + i];
        }
    }
    free(order);
    guarded_protect(p->pages, false);
    args->page_table = guarded_for_kernel(p->pages);
}

static fa_tensor as_tensor(const kvcache_tensor *t) {
    return (fa_tensor){guarded_for_kernel(t->data), t->strides[0], t->strides[1], t->strides[2]};
}

static fa_per_head make_per_head(fa_dtype dtype, int64_t batch, int64_t heads, double middle, double spread,
                                 uint64_t id, placement where) {
    kvcache_tensor t = make_tensor(dtype, batch, heads, 1, 1, false, where);
    for (int64_t i = 0; i < kvcache_size(&t); ++i)
        fa_store(t.data, dtype, i, middle + spread * uniform(TENSOR_HEADS + 16 * id, (uint64_t)i));
    guarded_protect(t.data, false);
    return (fa_per_head){guarded_for_kernel(t.data), dtype, batch > 1 ? heads : 0, 1};
}

static void make_rotary(const kvcache_case *c, fa_dtype dtype, fa_kvcache_args *args, placement where) {
    const int64_t positions = args->max_pages * args->page_size + 1, pairs = c->rotary_dim / 2;
    const fa_dtype stored = c->wide_rotary ? FA_FLOAT32 : dtype;
    kvcache_tensor tables[2] = {make_tensor(stored, 1, 1, positions, pairs, false, where),
                                make_tensor(stored, 1, 1, positions, pairs, false, where)};
    for (int64_t i = 0; i < positions * pairs; ++i) {
        const double angle = (double)(i / pairs) * pow(10000, -(double)(i % pairs) / (double)pairs);
        fa_store(tables[0].data, stored, i, cos(angle));
        fa_store(tables[1].data, stored, i, sin(angle));
    }
    for (int i = 0; i < 2; ++i) guarded_protect(tables[i].data, false);
    args->rotary = (fa_rotary){guarded_for_kernel(tables[0].data),
                               guarded_for_kernel(tables[1].data),
                               stored,
                               positions,
                               c->rotary_dim,
                               c->interleaved};
}

static void make_tree(const kvcache_case *c, fa_kvcache_args *args, placement where) {
    const int64_t masks = c->tree > 1 ? c->batch : 1, rows = c->seqlen_q;
    uint8_t *mask = guarded((size_t)(masks * rows * rows), 1, where);
    for (int64_t i = 0; i < masks * rows * rows; ++i) // a row sees itself and some of those before it
        mask[i] = i / rows % rows == i % rows || (i % rows < i / rows % rows && uniform(TENSOR_TREE, (uint64_t)i) > 0);
    guarded_protect(mask, false);
    args->tree_mask = guarded_for_kernel(mask), args->tree_mask_stride_b = c->tree > 1 ? rows * rows : 0;
}

kvcache_problem kvcache_problem_make(const kvcache_case *c, fa_dtype dtype, fa_impl impl, placement where) {
    const fa_dtype wide = dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32;
    kvcache_problem p = {0};
    fa_kvcache_args *args = &p.args;
    args->device = on_gpu(where) ? FA_CUDA : FA_CPU, args->impl = impl;
    args->dtype = dtype, args->cache_dtype = c->float8 ? FA_FLOAT8_E4M3 : dtype;
    args->batch = c->batch, args->heads_q = c->heads_q, args->heads_kv = c->heads_kv ? c->heads_kv : c->heads_q;
    args->seqlen_q = c->seqlen_q, args->head_dim = c->head_dim;
    args->head_dim_v = c->head_dim_v ? c->head_dim_v : c->head_dim;
    args->page_size = c->page_size ? c->page_size : c->capacity;
    args->max_pages = c->page_size ? (c->capacity + c->page_size - 1) / c->page_size : 1;
    args->pages = c->batch;
    args->softmax_scale = 1 / sqrt(c->head_dim), args->softcap = c->softcap, args->causal = c->causal;
    args->window_left = c->window ? c->window_left : -1, args->window_right = c->window ? c->window_right : -1;
    p.lengths = guarded((size_t)c->batch * sizeof *p.lengths, sizeof *p.lengths, where);
    for (int b = 0; b < c->batch; ++b) p.lengths[b] = c->lengths[b];
    guarded_protect(p.lengths, false);
    args->cache_seqlens = guarded_for_kernel(p.lengths);
    if (c->page_size || c->indexed) make_pages(c, &p, where);

    const int64_t hkv = args->heads_kv, rows = c->seqlen_q, dv = args->head_dim_v;
    p.q = make_tensor(dtype, c->batch, c->heads_q, rows, c->head_dim, c->token_major, where);
    fill(&p.q, TENSOR_Q, c->magnitude > 0 ? c->magnitude : 2);
    if (c->append) {
        p.k = make_tensor(dtype, c->batch, hkv, rows, c->head_dim, c->token_major, where);
        p.v = make_tensor(dtype, c->batch, hkv, rows, dv, c->token_major, where);
        fill(&p.k, TENSOR_K, 2);
        fill(&p.v, TENSOR_V, 2);
        args->k = as_tensor(&p.k), args->v = as_tensor(&p.v);
    }
    const fa_dtype stored = args->cache_dtype;
    p.k_cache = make_tensor(stored, args->pages, hkv, args->page_size, c->head_dim, c->token_major, where);
    p.v_cache = make_tensor(stored, args->pages, hkv, args->page_size, dv, c->token_major, where);
    fill_cache(c, &p, &p.k_cache, TENSOR_K_CACHE);
    fill_cache(c, &p, &p.v_cache, TENSOR_V_CACHE);
    p.o = make_tensor(dtype, c->batch, c->heads_q, rows, dv, c->token_major, where);
    if (!c->no_lse) p.lse = make_tensor(wide, c->batch, c->heads_q, rows, 1, false, where);
    args->q = as_tensor(&p.q), args->o = as_tensor(&p.o), args->lse = as_tensor(&p.lse);
    args->k_cache = as_tensor(&p.k_cache), args->v_cache = as_tensor(&p.v_cache);
    if (c->rotary_dim) make_rotary(c, dtype, args, where);
    if (c->tree) make_tree(c, args, where);
    if (c->alibi)
        args->alibi_slopes = make_per_head(wide, c->alibi > 1 ? c->batch : 1, c->heads_q, 0.1, 0.05, 1, where);
    if (c->sinks) args->sinks = make_per_head(dtype, 1, c->heads_q, 0, 2, 2, where);
    if (c->descale) {
        args->k_descale = make_per_head(FA_FLOAT32, c->descale > 1 ? c->batch : 1, hkv, 1, 0.5, 3, where);
        args->v_descale = make_per_head(FA_FLOAT32, c->descale > 1 ? c->batch : 1, hkv, 0.8, 0.3, 4, where);
    }
    return p;
}

bool kvcache_problem_serves(const kvcache_problem *p) {
    size_t bytes;
    return fa_kvcache_workspace_bytes(&p->args, &bytes) != FA_ERROR_UNSUPPORTED;
}

void kvcache_problem_run(kvcache_problem *p, fa_workers workers, placement where) {
    fa_kvcache_args *args = &p->args;
    args->workers = workers;
    guarded_to_gpu();
    expect(fa_kvcache_workspace_bytes(args, &args->workspace_bytes) == FA_OK, "%s", fa_error_text());
    args->workspace = guarded_scratch(args->workspace_bytes, FA_WORKSPACE_ALIGNMENT, where);
    expect(fa_kvcache_forward(args) == FA_OK, "%s", fa_error_text());
    guarded_from_gpu();
}

static void advance(fa_tensor *t, const kvcache_tensor *of, int b) {
    if (t->data) t->data = (char *)t->data + b * of->strides[0] * fa_dtype_bytes(of->dtype);
}

void kvcache_problem_keep(kvcache_problem *p, int b) {
    fa_kvcache_args *args = &p->args;
    args->batch = 1;
    args->cache_seqlens += b;
    if (args->page_table) {
        args->page_table += b * args->page_table_stride;
    } else {
        args->pages = 1;
        advance(&args->k_cache, &p->k_cache, b);
        advance(&args->v_cache, &p->v_cache, b);
    }
    advance(&args->q, &p->q, b);
    advance(&args->k, &p->k, b);
    advance(&args->v, &p->v, b);
    advance(&args->o, &p->o, b);
    advance(&args->lse, &p->lse, b);
    if (args->tree_mask) args->tree_mask += b * args->tree_mask_stride_b;
    fa_per_head *const per_head[] = {&args->alibi_slopes, &args->k_descale, &args->v_descale};
    for (int i = 0; i < 3; ++i)
        if (per_head[i]->data)
            per_head[i]->data =
                (char *)per_head[i]->data + b * per_head[i]->stride_b * fa_dtype_bytes(per_head[i]->dtype);
}
