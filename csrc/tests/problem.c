#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/convert.h"

// clang-format off
const char *const kViewNames[VIEW_COUNT] = {
    "q", "k", "v", "bias", "alibi_slopes", "sinks", "d_o", "d_lse",
    "o", "lse", "d_q", "d_k", "d_v", "d_bias", "d_alibi_slopes", "d_sinks",
};
// clang-format on

int64_t view_size(const view *v) { return v->sizes[0] * v->sizes[1] * v->sizes[2] * v->sizes[3]; }

static int64_t offset_of(const view *v, int64_t logical_index) {
    int64_t offset = 0;
    for (int axis = 3; axis >= 0; --axis) {
        offset += logical_index % v->sizes[axis] * v->strides[axis];
        logical_index /= v->sizes[axis];
    }
    return offset;
}

double view_at(const view *v, int64_t logical_index) { return fa_load(v->data, v->dtype, offset_of(v, logical_index)); }

static double uniform(uint64_t tensor, uint64_t index) { // in [-1, 1), splitmix64
    uint64_t x = (tensor + 1) * 0x9E3779B97F4A7C15u + index * 0xD1B54A32D192ED03u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (double)((x ^ (x >> 31)) >> 11) * 0x1p-52 - 1;
}

static double value_of(const attention_case *c, view_id id, uint64_t index) {
    const double x = uniform(id, index);
    if (id == VIEW_Q && c->magnitude > 0) return x * c->magnitude;
    if (id == VIEW_BIAS && strchr(c->bias, '-') && x > 0.6) return -INFINITY;
    if (id == VIEW_BIAS && strchr(c->bias, '~') && x > 0.6) return -1e9; // a mask, as models write it
    if (id == VIEW_SLOPES) return 0.1 + 0.05 * x;
    return 2 * x;
}

// Axes whose `present` is 0 broadcast; gaps: unused elements after each row of axis 2, and after each entry of axis 1.
static view make_view(fa_dtype dtype, const int64_t sizes[4], const int present[4], layout layout, placement where) {
    static const int kOrder[2][4] = {{3, 2, 1, 0}, {3, 1, 2, 0}}; // innermost first
    view v = {.dtype = dtype, .elements = 1};
    for (int i = 0; i < 4; ++i) {
        const int axis = kOrder[layout == LAYOUT_BLHD][i];
        v.sizes[axis] = present[axis] || sizes[axis] > 0 ? sizes[axis] : 1; // (1, H, L, L) has elements even if B = 0
        v.strides[axis] = present[axis] ? v.elements : 0;
        if (present[axis]) v.elements *= sizes[axis];
        if (layout == LAYOUT_GAPS && i < 2) v.elements += i == 0 ? 3 : 5;
    }
    const size_t bytes = (size_t)(v.elements * fa_dtype_bytes(dtype));
    v.data = guarded(bytes, (size_t)fa_dtype_bytes(dtype), where);
    return v;
}

// The logical index with 0 along the axes that broadcast: one value there.
static uint64_t value_index(const view *v, int64_t logical_index) {
    int64_t index = 0, scale = 1;
    for (int axis = 3; axis >= 0; --axis) {
        index += v->strides[axis] ? logical_index % v->sizes[axis] * scale : 0;
        logical_index /= v->sizes[axis];
        scale *= v->sizes[axis];
    }
    return (uint64_t)index;
}

static void fill_view(const attention_case *c, view *v, view_id id, fa_dtype rounded_to) {
    for (int64_t i = 0; i < view_size(v); ++i) {
        double rounded = 0;
        fa_store(&rounded, rounded_to, 0, value_of(c, id, value_index(v, i)));
        fa_store(v->data, v->dtype, offset_of(v, i), fa_load(&rounded, rounded_to, 0));
    }
    guarded_protect(v->data, false);
}

// Lengths of sequence b: the first is whole, one has no key, one has no query.
static int length_of(int64_t b, int64_t longest, bool keys) {
    static const double kShares[2][5] = {{1, 0.4, 0.7, 0, 0.9}, {1, 0.6, 0, 0.5, 0.3}};
    return (int)((double)longest * kShares[keys][b % 5]);
}

static int32_t *make_lengths(const attention_case *c, bool keys, int64_t *total, placement where) {
    const bool packed = c->lengths == LENGTHS_PACKED;
    const int64_t count = c->batch + packed;
    int32_t *lengths = guarded((size_t)count * sizeof *lengths, sizeof *lengths, where);
    int32_t sum = 0;
    for (int64_t b = 0; b < count; ++b) {
        const int length = length_of(b, keys ? c->seqlen_k : c->seqlen_q, keys);
        lengths[b] = packed ? sum : length;
        sum += length;
    }
    *total = packed ? lengths[c->batch] + 3 : 0; // 3 rows that belong to no sequence
    guarded_protect(lengths, false);
    return lengths;
}

static fa_tensor as_tensor(const view *v) {
    return (fa_tensor){guarded_for_kernel(v->data), v->strides[0], v->strides[1], v->strides[2]};
}
static fa_bias as_bias(const view *v) {
    return (fa_bias){guarded_for_kernel(v->data), v->dtype, v->strides[0], v->strides[1], v->strides[2], v->strides[3]};
}
static fa_per_head as_per_head(const view *v) {
    return (fa_per_head){guarded_for_kernel(v->data), v->dtype, v->strides[0], v->strides[1]};
}

problem problem_make(const attention_case *c, fa_dtype dtype, fa_impl impl, bool oracle, placement where) {
    static const int kAll[4] = {1, 1, 1, 1};
    const fa_dtype lse_dtype = dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32;
    const fa_dtype extras_dtype = c->wide_extras ? FA_FLOAT32 : dtype;
    const fa_dtype slopes_dtype = c->wide_extras ? FA_FLOAT32 : lse_dtype;
#define STORED(DTYPE) (oracle ? FA_FLOAT64 : (DTYPE))
    const layout layout = oracle && c->layout != LAYOUT_EXPANDED ? LAYOUT_BHLD : c->layout;
    problem p = {0};
    fa_forward_args *args = &p.args.forward;
    const bool packed = c->lengths == LENGTHS_PACKED;
    const int heads_kv = c->heads_kv ? c->heads_kv : c->heads_q, dv = c->head_dim_v ? c->head_dim_v : c->head_dim;
    args->device = on_gpu(where) ? FA_CUDA : FA_CPU, args->impl = impl, args->dtype = STORED(dtype);
    args->batch = c->batch, args->heads_q = c->heads_q, args->heads_kv = heads_kv;
    args->seqlen_q = c->seqlen_q, args->seqlen_k = c->seqlen_k, args->head_dim = c->head_dim, args->head_dim_v = dv;
    args->softmax_scale = 1 / sqrt(c->head_dim), args->softcap = c->softcap, args->causal = c->causal;
    args->window_left = c->window ? c->window_left : -1, args->window_right = c->window ? c->window_right : -1;
    args->dropout_p = c->dropout_p, args->dropout_offset = 7;
    p.args.deterministic = 1;
    if (c->lengths != LENGTHS_FULL) {
        p.lengths_q = make_lengths(c, false, &args->total_q, where);
        p.lengths_k = make_lengths(c, true, &args->total_k, where);
        *(packed ? &args->cu_seqlens_q : &args->seqlens_q) = guarded_for_kernel(p.lengths_q);
        *(packed ? &args->cu_seqlens_k : &args->seqlens_k) = guarded_for_kernel(p.lengths_k);
    }
    if (c->dropout_p > 0) {
        int64_t *seed = guarded(sizeof *seed, sizeof *seed, where);
        *seed = 0x123456789ABCDEF;
        guarded_protect(seed, false);
        args->dropout_seed = guarded_for_kernel(seed);
    }

    const int64_t batches = packed ? 1 : c->batch;
    const int64_t rows_q = packed ? args->total_q : c->seqlen_q, rows_k = packed ? args->total_k : c->seqlen_k;
    const int expanded[4] = {layout != LAYOUT_EXPANDED, 1, 1, 1};
    view *v = p.views;
#define SIZES(...) ((const int64_t[4]){__VA_ARGS__})
    v[VIEW_Q] = make_view(STORED(dtype), SIZES(batches, c->heads_q, rows_q, c->head_dim), kAll, layout, where);
    v[VIEW_K] = make_view(STORED(dtype), SIZES(batches, heads_kv, rows_k, c->head_dim), expanded, layout, where);
    v[VIEW_V] = make_view(STORED(dtype), SIZES(batches, heads_kv, rows_k, dv), expanded, layout, where);
    v[VIEW_O] = make_view(STORED(dtype), SIZES(batches, c->heads_q, rows_q, dv), kAll, layout, where);
    v[VIEW_LSE] = make_view(STORED(lse_dtype), SIZES(batches, c->heads_q, rows_q, 1), kAll, layout, where);
    v[VIEW_D_O] = make_view(STORED(dtype), v[VIEW_O].sizes, kAll, layout, where);
    v[VIEW_D_Q] = make_view(STORED(dtype), v[VIEW_Q].sizes, kAll, layout, where);
    v[VIEW_D_K] = make_view(STORED(dtype), v[VIEW_K].sizes, kAll, layout, where);
    v[VIEW_D_V] = make_view(STORED(dtype), v[VIEW_V].sizes, kAll, layout, where);
    if (c->d_lse) v[VIEW_D_LSE] = make_view(STORED(lse_dtype), v[VIEW_LSE].sizes, kAll, layout, where);
    if (c->bias) {
        const int axes[4] = {!!strchr(c->bias, 'b'), !!strchr(c->bias, 'h'), !!strchr(c->bias, 'q'),
                             !!strchr(c->bias, 'k')};
        const int64_t *sizes = SIZES(c->batch, c->heads_q, c->seqlen_q, c->seqlen_k);
        v[VIEW_BIAS] = make_view(STORED(extras_dtype), sizes, axes, layout, where);
        if (!c->const_extras) v[VIEW_D_BIAS] = make_view(STORED(extras_dtype), sizes, axes, layout, where);
    }
    if (c->alibi) {
        const int axes[4] = {c->alibi > 1, 1, 0, 0};
        v[VIEW_SLOPES] = make_view(STORED(slopes_dtype), SIZES(c->batch, c->heads_q, 1, 1), axes, LAYOUT_BHLD, where);
        if (!c->const_extras)
            v[VIEW_D_SLOPES] = make_view(STORED(slopes_dtype), v[VIEW_SLOPES].sizes, axes, LAYOUT_BHLD, where);
    }
    if (c->sinks) {
        const int axes[4] = {0, 1, 0, 0};
        v[VIEW_SINKS] = make_view(STORED(extras_dtype), SIZES(1, c->heads_q, 1, 1), axes, LAYOUT_BHLD, where);
        v[VIEW_D_SINKS] = make_view(STORED(extras_dtype), v[VIEW_SINKS].sizes, axes, LAYOUT_BHLD, where);
    }
#undef SIZES
#undef STORED
    fa_dtype rounded_to[VIEW_FIRST_OUTPUT] = {dtype, dtype, dtype, extras_dtype, slopes_dtype, extras_dtype};
    rounded_to[VIEW_D_O] = dtype, rounded_to[VIEW_D_LSE] = lse_dtype;
    for (view_id id = 0; id < VIEW_FIRST_OUTPUT; ++id)
        if (v[id].data) fill_view(c, &v[id], id, rounded_to[id]);

    args->q = as_tensor(&v[VIEW_Q]), args->k = as_tensor(&v[VIEW_K]), args->v = as_tensor(&v[VIEW_V]);
    args->o = as_tensor(&v[VIEW_O]), args->lse = as_tensor(&v[VIEW_LSE]);
    args->bias = as_bias(&v[VIEW_BIAS]), args->alibi_slopes = as_per_head(&v[VIEW_SLOPES]);
    args->sinks = as_per_head(&v[VIEW_SINKS]);
    p.args.d_o = as_tensor(&v[VIEW_D_O]), p.args.d_lse = as_tensor(&v[VIEW_D_LSE]);
    p.args.d_q = as_tensor(&v[VIEW_D_Q]), p.args.d_k = as_tensor(&v[VIEW_D_K]), p.args.d_v = as_tensor(&v[VIEW_D_V]);
    p.args.d_bias = as_bias(&v[VIEW_D_BIAS]), p.args.d_alibi_slopes = as_per_head(&v[VIEW_D_SLOPES]);
    p.args.d_sinks = as_per_head(&v[VIEW_D_SINKS]);
    return p;
}

static void expect_gaps_untouched(const view *v, view_id id) {
    char *touched = calloc((size_t)v->elements + 1, 1);
    for (int64_t i = 0; i < view_size(v); ++i) touched[offset_of(v, i)] = 1;
    const size_t width = (size_t)fa_dtype_bytes(v->dtype);
    static const unsigned char kUnwritten[8] = {255, 255, 255, 255, 255, 255, 255, 255};
    for (int64_t i = 0; i < v->elements; ++i)
        if (!expect(touched[i] || memcmp((char *)v->data + (size_t)i * width, kUnwritten, width) == 0,
                    "%s: wrote element %lld, between its rows", kViewNames[id], (long long)i))
            break;
    free(touched);
}

bool problem_serves(const problem *p, fa_pass pass) {
    const fa_impl impl = p->args.forward.impl;
    size_t bytes;
    if (impl == FA_NAIVE || impl == FA_FUSED || impl == FA_REFERENCE) return true;
    return (pass == FA_FORWARD ? fa_forward_workspace_bytes(&p->args.forward, &bytes)
                               : fa_backward_workspace_bytes(&p->args, &bytes)) != FA_ERROR_UNSUPPORTED;
}

void problem_run(problem *p, fa_workers workers, placement where) {
    fa_forward_args *args = &p->args.forward;
    args->workers = workers;
    guarded_to_gpu();
    expect(fa_forward_workspace_bytes(args, &args->workspace_bytes) == FA_OK, "%s", fa_error_text());
    args->workspace = guarded_scratch(args->workspace_bytes, FA_WORKSPACE_ALIGNMENT, where);
    expect(fa_forward(args) == FA_OK, "forward: %s", fa_error_text());
    guarded_from_gpu();
    guarded_protect(p->views[VIEW_O].data, false);
    guarded_protect(p->views[VIEW_LSE].data, false);
    if (problem_serves(p, FA_BACKWARD)) {
        expect(fa_backward_workspace_bytes(&p->args, &args->workspace_bytes) == FA_OK, "%s", fa_error_text());
        args->workspace = guarded_scratch(args->workspace_bytes, FA_WORKSPACE_ALIGNMENT, where);
        expect(fa_backward(&p->args) == FA_OK, "backward: %s", fa_error_text());
        guarded_from_gpu();
    }
    guarded_leave_gpu();
    for (view_id id = VIEW_FIRST_OUTPUT; id < VIEW_COUNT; ++id)
        if (p->views[id].data) expect_gaps_untouched(&p->views[id], id);
}
