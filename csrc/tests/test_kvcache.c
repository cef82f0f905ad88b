// Attention over a cache, every kernel against the CPU's float64 reference: o, lse, the new rows of the cache, and that no
// other row changed; the same bits with other workers, splits and placements, alone and in a batch, and in a later call
// that finds the new tokens in the cache.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cpu/convert.h"
#include "kvcache_problem.h"

#pragma GCC diagnostic ignored "-Wmissing-field-initializers" // a case names what it has
// clang-format off
static const kvcache_case kCases[] = {
    {"one element", 1, 1, 1, 1, 1, 1, .lengths = {1}},
    {"one token more", 1, 2, 1, 1, 2, 8, .lengths = {1}, .append = true, .causal = true},
    {"first token", 2, 4, 2, 1, 5, 64, .lengths = {0, 0}, .append = true, .causal = true},
    {"empty cache", 2, 4, 2, 3, 5, 40, .lengths = {0, 4}, .causal = true},
    {"empty cache, sink", 2, 4, 2, 1, 5, 40, .lengths = {0, 4}, .sinks = true},
    {"fewer keys than rows", 3, 2, 1, 4, 9, 16, .lengths = {1, 3, 9}, .causal = true},
    {"decode", 5, 4, 4, 1, 300, 64, .lengths = {300, 1, 255, 256, 257}, .causal = true},
    {"decode, 4 heads a group", 5, 8, 2, 1, 520, 128, .lengths = {511, 512, 513, 0, 63}, .append = true, .causal = true},
    {"decode, 8 heads a group", 3, 8, 1, 1, 200, 128, .lengths = {17, 199, 64}, .append = true},
    {"decode, 7 heads a group", 2, 14, 2, 1, 90, 80, .lengths = {89, 31}, .append = true, .causal = true},
    {"decode, 20 heads a group", 2, 20, 1, 1, 290, 64, .lengths = {289, 31}, .append = true, .causal = true},
    {"decode, no lse", 2, 4, 2, 1, 70, 32, .lengths = {70, 3}, .no_lse = true},
    {"one key head, several splits", 2, 3, 1, 1, 2100, 32, .lengths = {2100, 1500}, .append = false},
    {"several splits and rows", 2, 4, 2, 3, 1700, 16, .lengths = {1600, 5}, .append = true, .causal = true, .sinks = true},
    {"several splits, pages of 16", 2, 4, 1, 2, 1700, 40, .lengths = {1600, 900}, .append = true, .page_size = 16},
    {"4 rows", 3, 4, 2, 4, 100, 64, .lengths = {96, 0, 31}, .append = true, .causal = true},
    {"7 rows", 2, 4, 1, 7, 80, 96, .lengths = {73, 20}, .append = true, .causal = true},
    {"33 rows", 2, 4, 2, 33, 330, 64, .lengths = {297, 3}, .append = true, .causal = true},
    {"130 rows", 2, 4, 2, 130, 300, 40, .lengths = {170, 0}, .append = true, .causal = true},
    {"130 rows, pages of 64", 2, 2, 1, 130, 700, 64, .lengths = {550, 100}, .append = true, .causal = true, .page_size = 64},
    {"rows that were there", 2, 4, 2, 20, 330, 64, .lengths = {330, 33}, .causal = true},
    {"pages of 1", 3, 4, 2, 2, 70, 40, .lengths = {68, 1, 30}, .append = true, .causal = true, .page_size = 1},
    {"pages of 3", 3, 4, 1, 5, 280, 64, .lengths = {270, 1, 30}, .append = true, .causal = true, .page_size = 3},
    {"pages of 64", 3, 4, 1, 1, 300, 128, .lengths = {299, 64, 63}, .append = true, .causal = true, .page_size = 64},
    {"pages of 256", 2, 4, 2, 1, 1024, 64, .lengths = {1023, 255}, .append = true, .causal = true, .page_size = 256},
    {"shared page", 3, 4, 2, 1, 100, 32, .lengths = {40, 32, 99}, .append = true, .causal = true, .page_size = 16, .shared = true},
    {"indexed", 3, 4, 2, 1, 70, 64, .lengths = {30, 70, 5}, .indexed = true, .causal = true},
    {"indexed, new tokens", 3, 4, 2, 2, 70, 64, .lengths = {30, 68, 5}, .append = true, .indexed = true, .causal = true},
    {"token-major", 3, 8, 2, 3, 290, 64, .lengths = {280, 0, 5}, .append = true, .causal = true, .token_major = true},
    {"token-major pages", 2, 8, 2, 1, 90, 64, .lengths = {80, 5}, .append = true, .page_size = 16, .token_major = true},
    {"head_dim 256", 2, 4, 1, 2, 140, 256, .lengths = {130, 30}, .append = true, .causal = true},
    {"head_dim 512", 2, 2, 1, 1, 70, 512, .lengths = {69, 30}, .append = true, .causal = true},
    {"head_dim 5", 2, 2, 1, 1, 70, 5, 7, .lengths = {69, 30}, .append = true, .causal = true},
    {"head_dim 33, head_dim_v 100", 2, 2, 1, 20, 70, 33, 100, .lengths = {50, 30}, .append = true, .causal = true},
    {"head_dim 192, head_dim_v 128", 2, 4, 1, 1, 140, 192, 128, .lengths = {130, 30}, .append = true, .causal = true},
    {"head_dim 64, head_dim_v 512", 1, 16, 1, 1, 140, 64, 512, .lengths = {139}, .append = true, .causal = true},
    {"softcap", 2, 4, 2, 1, 100, 64, .lengths = {99, 3}, .append = true, .softcap = 1.5, .magnitude = 5},
    {"alibi", 2, 4, 2, 3, 100, 64, .lengths = {97, 3}, .append = true, .alibi = 1, .causal = true},
    {"alibi for each sequence", 2, 4, 2, 30, 100, 64, .lengths = {60, 3}, .append = true, .alibi = 2},
    {"window", 2, 4, 2, 1, 900, 64, .lengths = {890, 20}, .append = true, .window = true, .window_left = 100, .causal = true},
    {"window, rows", 2, 4, 2, 30, 400, 64, .lengths = {370, 0}, .append = true, .window = true, .window_left = 10, .window_right = 3},
    {"window, left, several splits", 1, 2, 1, 3, 2500, 16, .lengths = {2400}, .append = true, .window = true, .window_left = 1200,
     .window_right = -1, .causal = true},
    {"sinks", 2, 8, 2, 2, 100, 64, .lengths = {90, 0}, .append = true, .sinks = true, .causal = true},
    {"tree", 2, 4, 2, 7, 100, 64, .lengths = {90, 0}, .append = true, .tree = 1, .causal = true},
    {"tree for each sequence", 3, 4, 1, 5, 300, 32, .lengths = {290, 0, 255}, .append = true, .tree = 2},
    {"tree of many rows", 2, 2, 1, 40, 300, 32, .lengths = {250, 10}, .append = true, .tree = 2, .page_size = 16},
    {"tree, window", 2, 4, 1, 5, 300, 32, .lengths = {290, 0}, .append = true, .tree = 1, .window = true, .window_left = 3,
     .window_right = 0},
    {"tree of tokens that were there", 2, 4, 2, 6, 100, 64, .lengths = {90, 6}, .tree = 2},
    {"rotary", 2, 4, 2, 3, 100, 64, .lengths = {90, 0}, .append = true, .rotary_dim = 64, .causal = true},
    {"rotary, pairs side by side", 2, 4, 2, 1, 100, 64, .lengths = {99, 0}, .append = true, .rotary_dim = 64, .interleaved = true,
     .wide_rotary = true, .causal = true},
    {"rotary of a part", 2, 4, 1, 20, 100, 80, .lengths = {70, 3}, .append = true, .rotary_dim = 24, .page_size = 16, .causal = true},
    {"rotary of 2", 1, 2, 2, 2, 20, 7, .lengths = {9}, .append = true, .rotary_dim = 2, .interleaved = true, .wide_rotary = true},
    {"large scores", 2, 4, 2, 2, 600, 32, .lengths = {590, 40}, .append = true, .causal = true, .magnitude = 4000},
    {"float8", 3, 8, 2, 1, 300, 128, .lengths = {300, 1, 63}, .float8 = true, .causal = true},
    {"float8, new tokens", 2, 8, 2, 3, 300, 64, .lengths = {290, 0}, .append = true, .float8 = true, .descale = 1, .causal = true},
    {"float8, pages", 2, 4, 1, 1, 600, 96, .lengths = {590, 9}, .append = true, .float8 = true, .descale = 2, .page_size = 16},
    {"float8, many rows", 2, 4, 1, 40, 330, 72, 40, .lengths = {290, 9}, .append = true, .float8 = true, .descale = 2, .causal = true},
    {"float8, rotary", 2, 4, 2, 2, 70, 40, .lengths = {60, 9}, .append = true, .float8 = true, .descale = 1, .rotary_dim = 40},
    {"no batch", 0, 2, 2, 1, 10, 8, .sinks = true},
    {"no rows", 2, 2, 2, 0, 10, 8, .lengths = {10, 3}, .append = true},
    {"no capacity", 2, 2, 2, 3, 0, 8, .lengths = {0, 0}},
    {"everything", 4, 8, 2, 6, 700, 72, 40, .lengths = {690, 0, 300, 16}, .append = true, .page_size = 16, .token_major = true,
     .rotary_dim = 16, .interleaved = true, .window = true, .window_left = 600, .window_right = 2, .softcap = 3, .alibi = 2,
     .sinks = true, .tree = 2},
    {"everything, float8", 4, 8, 2, 5, 700, 72, 40, .lengths = {690, 0, 300, 16}, .append = true, .page_size = 16, .rotary_dim = 16,
     .window = true, .window_left = 600, .window_right = 2, .softcap = 3, .alibi = 1, .sinks = true, .causal = true,
     .float8 = true, .descale = 2},
};
// clang-format on

static const double kUnitRoundoff[] = {0x1p-24, 0x1p-53, 0x1p-11, 0x1p-8, 0x1p-4}; // by fa_dtype

static double largest(const kvcache_tensor *t) {
    double most = 0;
    for (int64_t i = 0; t->data && i < kvcache_size(t); ++i)
        if (isfinite(kvcache_at(t, i))) most = fmax(most, fabs(kvcache_at(t, i)));
    return most;
}

// Rounding of what is stored, of q once it is rotated, and of the arithmetic: as an exponent's error is absolute, it grows
// with the scores.
static double tolerance(const kvcache_problem *p, const kvcache_problem *oracle, const kvcache_tensor *wanted) {
    const bool is_lse = wanted == &oracle->lse;
    const double inputs = kUnitRoundoff[p->args.dtype], arithmetic = p->args.dtype == FA_FLOAT64 ? inputs : 0x1p-24;
    const double scale = fmax(largest(wanted), is_lse ? 1 : 0.1), scores = is_lse ? 0 : largest(&oracle->lse);
    const double stored = is_lse && !p->args.rotary.cos ? arithmetic : inputs;
    return scale * 8 * stored + scale * 32 * arithmetic * (4 + scores);
}

static void expect_close(const kvcache_problem *p, const kvcache_problem *oracle, const char *name,
                         const kvcache_tensor *got, const kvcache_tensor *wanted) {
    const double most = tolerance(p, oracle, wanted);
    double worst = 0, sum = 0;
    int64_t worst_at = 0, infinities = 0;
    if (!got->data || kvcache_size(got) == 0) return;
    for (int64_t i = 0; i < kvcache_size(got); ++i) {
        const double x = kvcache_at(got, i), ref = kvcache_at(wanted, i);
        if (isinf(x) || isinf(ref)) {
            infinities += x != ref;
            continue;
        }
        const double error = isnan(x) ? INFINITY : fabs(x - ref);
        sum += fmin(error, 1e30);
        if (error > worst) worst = error, worst_at = i;
    }
    expect(worst <= most, "%s[%lld]: %.9g instead of %.9g, allowed %.3g", name, (long long)worst_at,
           kvcache_at(got, worst_at), kvcache_at(wanted, worst_at), most);
    expect(sum / (double)kvcache_size(got) <= most / 4, "%s: mean error %.3g, allowed %.3g", name,
           sum / (double)kvcache_size(got), most / 4);
    expect(infinities == 0, "%s: infinite in %lld wrong places", name, (long long)infinities);
}

static size_t bytes_of(const kvcache_tensor *t) { return (size_t)(kvcache_size(t) * fa_dtype_bytes(t->dtype)); }

static void expect_same_bits(const kvcache_tensor *a, const kvcache_tensor *b, const char *name, const char *when) {
    if (a->data) expect(memcmp(a->data, b->data, bytes_of(a)) == 0, "%s: not the same bits %s", name, when);
}

// New rows are as the reference stored them, to the bit where nothing was rotated; all others as they were in `before`.
static void expect_cache(const kvcache_case *c, const kvcache_problem *p, const kvcache_tensor *got,
                         const kvcache_tensor *wanted, const kvcache_tensor *before, bool rotated) {
    const fa_dtype dtype = got->dtype;
    const size_t element = (size_t)fa_dtype_bytes(dtype);
    const double most = dtype == FA_FLOAT8_E4M3 ? 0x1p-9 : 0x1p-22; // of denormals; of what rotating in float32 cancels
    unsigned char *expected = before->data; // becomes what is expected, but for rotated rows, which get what is there
    for (int b = 0; b < c->batch && c->append; ++b)
        for (int h = 0; h < p->args.heads_kv; ++h)
            for (int i = 0; i < c->seqlen_q; ++i) {
                const int64_t row = kvcache_row(p, got, b, h, c->lengths[b] + i);
                for (int64_t d = row; d < row + got->sizes[3]; ++d) {
                    const double x = fa_load(got->data, dtype, d), ref = fa_load(wanted->data, dtype, d);
                    const bool close = fabs(x - ref) <= most + 2 * kUnitRoundoff[dtype] * fabs(ref);
                    const void *source = rotated && close ? got->data : wanted->data;
                    memcpy(expected + (size_t)d * element, (const char *)source + (size_t)d * element, element);
                }
            }
    expect(memcmp(got->data, expected, bytes_of(got)) == 0, "%s: a row is not what it was, or what was to be stored",
           got == &p->k_cache ? "k_cache" : "v_cache");
}

static const char *kDtypeOfCache[] = {"", ", float8"};

// A call without k finds what the call before it stored.
static void expect_found(const kvcache_case *c, fa_dtype dtype, fa_impl impl, placement where) {
    kvcache_problem first = kvcache_problem_make(c, dtype, impl, where), second;
    if (!c->append || c->rotary_dim || c->batch == 0) return;
    kvcache_problem_run(&first, (fa_workers){0}, where);
    second = first;
    const kvcache_tensor o = first.o;
    kvcache_tensor again = o;
    again.data = guarded(bytes_of(&o), (size_t)fa_dtype_bytes(dtype), where);
    second.args.o.data = guarded_for_kernel(again.data);
    guarded_protect(first.lengths, true);
    for (int b = 0; b < c->batch; ++b) first.lengths[b] += c->seqlen_q;
    guarded_protect(first.lengths, false);
    second.args.k.data = second.args.v.data = NULL;
    kvcache_problem_run(&second, (fa_workers){0}, where);
    expect_same_bits(&again, &o, "o", "when the tokens are in the cache");
}

// The last sequence alone, in caches that the others have not touched.
static void expect_alone(const kvcache_case *c, fa_dtype dtype, fa_impl impl, placement where,
                         const kvcache_problem *batch) {
    kvcache_problem alone = kvcache_problem_make(c, dtype, impl, where);
    const int last = c->batch - 1;
    if (last < 1) return;
    kvcache_problem_keep(&alone, last);
    kvcache_problem_run(&alone, (fa_workers){0}, where);
    const size_t o_bytes = bytes_of(&alone.o) / (size_t)c->batch, lse_bytes = bytes_of(&alone.lse) / (size_t)c->batch;
    expect(memcmp((char *)alone.o.data + (size_t)last * o_bytes, (char *)batch->o.data + (size_t)last * o_bytes,
                  o_bytes) == 0,
           "o: a sequence alone has other bits than in a batch");
    if (alone.lse.data)
        expect(memcmp((char *)alone.lse.data + (size_t)last * lse_bytes,
                      (char *)batch->lse.data + (size_t)last * lse_bytes, lse_bytes) == 0,
               "lse: a sequence alone has other bits than in a batch");
}

static void run_kernel(const kvcache_case *c, fa_dtype dtype, const fa_kernel_info *kernel,
                       const kvcache_problem *oracle) {
    const bool gpu = kernel->device == FA_CUDA;
    const placement here = gpu ? GPU_ALIGNED : FLUSH_START;
    placement elsewhere = gpu ? GPU_UNALIGNED : FLUSH_END;
    kvcache_problem p = kvcache_problem_make(c, dtype, kernel->impl, here);
    test_begin("cache, %s, %s%s, %s", c->name, fa_dtype_name(dtype), kDtypeOfCache[c->float8], kernel->name);
    if (!kvcache_problem_serves(&p)) {
        expect(kernel->impl != FA_FUSED, "%s", fa_error_text());
        return;
    }
    const kvcache_problem before = kvcache_problem_make(c, dtype, kernel->impl, here);
    kvcache_problem_run(&p, (fa_workers){0}, here);
    expect_close(&p, oracle, "o", &p.o, &oracle->o);
    expect_close(&p, oracle, "lse", &p.lse, &oracle->lse);
    if (!g_sanitize) {
        kvcache_problem other = kvcache_problem_make(c, dtype, kernel->impl, elsewhere);
        if (!kvcache_problem_serves(&other))
            other = kvcache_problem_make(c, dtype, kernel->impl, elsewhere = GPU_VECTORS);
        other.args.num_splits = 3;
        kvcache_problem_run(&other, fa_posix_workers(3), elsewhere);
        expect_same_bits(&p.o, &other.o, "o", "with other workers and splits");
        expect_same_bits(&p.lse, &other.lse, "lse", "with other workers and splits");
        expect_same_bits(&p.k_cache, &other.k_cache, "k_cache", "with other workers and splits");
        expect_same_bits(&p.v_cache, &other.v_cache, "v_cache", "with other workers and splits");
        expect_alone(c, dtype, kernel->impl, here, &p);
        expect_found(c, dtype, kernel->impl, here);
    }
    expect_cache(c, &p, &p.k_cache, &oracle->k_cache, &before.k_cache, c->rotary_dim > 0);
    expect_cache(c, &p, &p.v_cache, &oracle->v_cache, &before.v_cache, false);
    guarded_leave_gpu();
}

static void run_case(const kvcache_case *c, fa_dtype dtype, fa_device device) {
    for (int32_t i = 0; i < fa_kernel_count(); ++i) {
        fa_kernel_info kernel;
        fa_kernel_describe(i, &kernel);
        if (kernel.device != device || kernel.impl == FA_REFERENCE) continue;
        test_begin("cache, %s, %s%s, reference", c->name, fa_dtype_name(dtype), kDtypeOfCache[c->float8]);
        kvcache_problem oracle = kvcache_problem_make(c, dtype, FA_REFERENCE, FLUSH_END);
        kvcache_problem_run(&oracle, (fa_workers){0}, FLUSH_END);
        run_kernel(c, dtype, &kernel, &oracle);
        guarded_release_all();
    }
}

// A cache that is full is a tensor of keys and values.
static void test_full_cache(void) {
    const kvcache_case c = {"full cache",
                            2,
                            4,
                            2,
                            5,
                            50,
                            24,
                            16,
                            .lengths = {50, 50},
                            .causal = true,
                            .window = true,
                            .window_left = 30,
                            .window_right = 2,
                            .softcap = 3,
                            .alibi = 2,
                            .sinks = true};
    test_begin("cache: a full one is attention's k and v");
    kvcache_problem p = kvcache_problem_make(&c, FA_FLOAT64, FA_REFERENCE, FLUSH_END);
    kvcache_problem_run(&p, (fa_workers){0}, FLUSH_END);
    const fa_kvcache_args *args = &p.args;
    kvcache_tensor o = p.o, lse = p.lse;
    o.data = guarded(bytes_of(&o), 8, FLUSH_END), lse.data = guarded(bytes_of(&lse), 8, FLUSH_END);
    fa_forward_args forward = {.impl = FA_REFERENCE,
                               .dtype = args->dtype,
                               .batch = args->batch,
                               .heads_q = args->heads_q,
                               .heads_kv = args->heads_kv,
                               .seqlen_q = args->seqlen_q,
                               .seqlen_k = c.capacity,
                               .head_dim = args->head_dim,
                               .head_dim_v = args->head_dim_v,
                               .q = args->q,
                               .k = args->k_cache,
                               .v = args->v_cache,
                               .o = args->o,
                               .lse = args->lse,
                               .softmax_scale = args->softmax_scale,
                               .softcap = args->softcap,
                               .causal = 1,
                               .window_left = args->window_left,
                               .window_right = args->window_right,
                               .alibi_slopes = args->alibi_slopes,
                               .sinks = args->sinks};
    forward.o.data = o.data, forward.lse.data = lse.data;
    expect(fa_forward_workspace_bytes(&forward, &forward.workspace_bytes) == FA_OK, "%s", fa_error_text());
    forward.workspace = guarded_scratch(forward.workspace_bytes, FA_WORKSPACE_ALIGNMENT, FLUSH_END);
    expect(fa_forward(&forward) == FA_OK, "%s", fa_error_text());
    expect_close(&p, &p, "o", &o, &p.o);
    expect_close(&p, &p, "lse", &lse, &p.lse);
    guarded_release_all();
}

static uint64_t g_random = 1;
static int draw(int count) { // in [0, count)
    g_random = g_random * 6364136223846793005u + 1442695040888963407u;
    return (int)((g_random >> 33) % (uint64_t)count);
}

static kvcache_case random_case(void) {
    static const int kPageSizes[] = {0, 0, 1, 3, 16, 64}, kRows[] = {1, 1, 2, 5, 17, 40},
                     kGroups[] = {1, 2, 3, 4, 7, 9};
    const int heads_kv = 1 + draw(3), head_dim = 1 + draw(draw(2) ? 40 : 140);
    kvcache_case c = {.batch = 1 + draw(4), .heads_q = heads_kv * kGroups[draw(6)], .heads_kv = heads_kv};
    c.seqlen_q = kRows[draw(6)], c.head_dim = head_dim, c.head_dim_v = draw(2) ? head_dim : 1 + draw(140);
    c.append = draw(3) > 0, c.capacity = c.seqlen_q + draw(draw(4) ? 300 : 1400);
    for (int b = 0; b < c.batch; ++b) c.lengths[b] = draw(c.capacity + 1 - (c.append ? c.seqlen_q : 0));
    c.page_size = kPageSizes[draw(6)], c.indexed = draw(2), c.token_major = draw(2), c.causal = draw(2);
    c.window = draw(3) == 0, c.window_left = draw(300) - 1, c.window_right = draw(20) - 1;
    c.softcap = draw(4) ? 0 : 3, c.alibi = draw(4) ? 0 : 1 + draw(2), c.sinks = draw(3) == 0;
    c.tree = draw(3) ? 0 : 1 + draw(2), c.float8 = draw(3) == 0, c.descale = c.float8 ? draw(3) : 0;
    if (c.append && head_dim > 1 && draw(2)) c.rotary_dim = 2 * (1 + draw(head_dim / 2));
    c.interleaved = draw(2), c.wide_rotary = draw(2), c.no_lse = draw(5) == 0;
    return c;
}

static bool is_left_out(const kvcache_case *c, fa_dtype dtype, int number) {
    const bool has_16_bits = dtype == FA_FLOAT16 || dtype == FA_BFLOAT16;
    if (c->float8 && !has_16_bits) return true;
    if (g_sanitize && g_quick) return (c->float8 ? FA_FLOAT16 + number % 2 : number % 4) != (int)dtype;
    return g_quick && c->batch * c->heads_q * c->seqlen_q * c->capacity * c->head_dim > 400000;
}

void test_kvcache(fa_device device) {
    if (device == FA_CPU) test_full_cache();
    for (size_t i = 0; i < sizeof kCases / sizeof kCases[0]; ++i)
        for (fa_dtype dtype = FA_FLOAT32; dtype <= FA_BFLOAT16; ++dtype)
            if (!is_left_out(&kCases[i], dtype, (int)i)) run_case(&kCases[i], dtype, device);
    for (int i = 0; i < (g_sanitize ? 0 : g_quick ? 10 : 60); ++i) {
        kvcache_case c = random_case();
        char name[32];
        snprintf(name, sizeof name, "random case %d", i);
        c.name = name;
        const fa_dtype dtype = (fa_dtype)(c.float8 ? FA_FLOAT16 + i % 2 : i % 4);
        if (!is_left_out(&c, dtype, i)) run_case(&c, dtype, device);
    }
}
