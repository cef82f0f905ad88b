// Every kernel against the CPU's float64 reference: outputs, gradients, what lies around them, the same bits in a second
// run, with 3 workers instead of 1 and with tensors and workspace that lie elsewhere. A kernel is left out where it refuses,
// which it must not do where it promises to serve.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/convert.h"
#include "problem.h"

#pragma GCC diagnostic ignored "-Wmissing-field-initializers" // a case names what it has
// clang-format off
static const attention_case kCases[] = {
    {"one element", 1, 1, 1, 1, 1, 1},
    {"one row", 2, 2, 2, 1, 65, 64},
    {"one key", 1, 2, 2, 33, 1, 40},
    {"plain", 2, 2, 2, 64, 64, 64},
    {"two key blocks", 1, 1, 1, 70, 513, 16},
    {"causal", 1, 2, 2, 67, 67, 64, .causal = true},
    {"causal, more keys", 1, 2, 2, 31, 97, 32, .causal = true},
    {"causal, rows without keys", 1, 2, 2, 97, 31, 32, .causal = true, .d_lse = true},
    {"causal, two key blocks", 1, 1, 1, 280, 280, 16, .causal = true},
    {"grouped heads", 2, 4, 2, 37, 43, 24, .causal = true},
    {"one key head", 1, 5, 1, 20, 50, 32},
    {"wide v", 1, 2, 1, 50, 50, 24, 72},
    {"narrow v", 1, 2, 1, 50, 50, 72, 8},
    {"head_dim 2", 1, 2, 2, 50, 50, 2},
    {"head_dim 5", 1, 2, 2, 50, 50, 5, 7},
    {"head_dim 80", 1, 2, 2, 40, 40, 80},
    {"head_dim 128", 1, 1, 1, 66, 66, 128, .causal = true},
    {"head_dim 257", 1, 1, 1, 30, 35, 257},
    {"head_dim 512", 1, 1, 1, 20, 33, 512, .causal = true},
    {"head_dim 1, head_dim_v 512", 1, 1, 1, 20, 33, 1, 512},
    {"window", 1, 2, 2, 90, 90, 32, .window = true, .window_left = 17, .window_right = 9},
    {"window, left only", 1, 2, 2, 90, 70, 32, .window = true, .window_left = 20, .window_right = -1},
    {"window, causal", 1, 2, 2, 120, 150, 16, .window = true, .window_left = 33, .window_right = 40, .causal = true},
    {"window of one key", 1, 2, 2, 40, 40, 16, .window = true},
    {"window, two key blocks", 1, 1, 1, 40, 600, 16, .window = true, .window_left = 300, .window_right = 5},
    {"softcap", 1, 2, 2, 50, 50, 32, .softcap = 1.5, .magnitude = 5},
    {"bias", 2, 2, 2, 40, 45, 32, .bias = "bhqk"},
    {"bias (1, 1, Lq, Lk)", 2, 2, 1, 40, 45, 32, .bias = "qk"},
    {"bias (B, 1, 1, Lk)", 3, 2, 2, 33, 45, 32, .bias = "bk", .causal = true},
    {"bias (1, Hq, Lq, 1)", 2, 2, 2, 33, 45, 32, .bias = "hq"},
    {"bias of one element", 2, 2, 2, 17, 20, 16, .bias = ""},
    {"bias with -inf", 1, 2, 2, 40, 45, 32, .bias = "hqk-"},
    {"bias in float32", 1, 2, 2, 40, 45, 32, .bias = "qk", .sinks = true, .alibi = 1, .wide_extras = true},
    {"alibi", 2, 3, 3, 50, 60, 32, .alibi = 1, .causal = true},
    {"alibi for each sequence", 2, 2, 1, 60, 50, 32, .alibi = 2},
    {"sinks", 2, 2, 2, 50, 40, 32, .sinks = true, .causal = true, .d_lse = true},
    {"dropout", 2, 2, 2, 50, 70, 32, .dropout_p = 0.3},
    {"dropout, causal", 1, 3, 1, 70, 290, 16, .dropout_p = 0.1, .causal = true},
    {"gradient through lse", 1, 2, 2, 50, 50, 32, .d_lse = true},
    {"padded", 5, 2, 2, 40, 50, 32, .lengths = LENGTHS_PADDED},
    {"padded, causal", 5, 4, 2, 70, 45, 16, .lengths = LENGTHS_PADDED, .causal = true, .sinks = true},
    {"packed", 5, 2, 2, 40, 50, 32, .lengths = LENGTHS_PACKED},
    {"packed, causal", 5, 4, 2, 70, 45, 16, .lengths = LENGTHS_PACKED, .causal = true, .alibi = 2},
    {"transposed", 2, 3, 3, 40, 50, 32, .layout = LAYOUT_BLHD, .bias = "bhqk", .causal = true},
    {"gaps", 2, 3, 3, 40, 50, 33, .layout = LAYOUT_GAPS, .bias = "bhqk"},
    {"gaps, padded", 3, 2, 2, 40, 50, 20, .layout = LAYOUT_GAPS, .lengths = LENGTHS_PADDED},
    {"gaps, packed", 3, 2, 2, 40, 50, 20, .layout = LAYOUT_GAPS, .lengths = LENGTHS_PACKED},
    {"expanded", 3, 2, 2, 30, 40, 32, .layout = LAYOUT_EXPANDED},
    {"large scores", 1, 2, 2, 40, 50, 16, .magnitude = 4000, .d_lse = true},
    {"large scores, causal", 1, 2, 2, 70, 280, 16, .magnitude = 4000, .causal = true},
    {"no batch", 0, 2, 2, 10, 10, 8, .sinks = true, .alibi = 1, .bias = "qk"},
    {"no rows", 2, 2, 2, 0, 10, 8, .sinks = true, .alibi = 2, .bias = "h"},
    {"no keys", 2, 2, 2, 10, 0, 8, .bias = "hq", .alibi = 1},
    {"no keys but a sink", 2, 2, 2, 10, 0, 8, .sinks = true, .d_lse = true},
    {"nothing", 0, 1, 1, 0, 0, 1},
    {"everything", 3, 4, 2, 45, 75, 40, 24, .causal = true, .window = true, .window_left = 30, .window_right = 3,
     .softcap = 3, .bias = "hqk-", .alibi = 2, .sinks = true, .dropout_p = 0.2, .lengths = LENGTHS_PADDED,
     .layout = LAYOUT_GAPS, .d_lse = true},
    // Tiles of tensor cores: 32, 64, 96, 128, 192 and 256 wide, 128 rows high, 64 or 32 keys long.
    {"16 bits, one row", 2, 4, 1, 1, 193, 24, 8, .sinks = true, .narrow = true},
    {"16 bits, rows without keys", 1, 2, 1, 193, 129, 8, 24, .causal = true, .d_lse = true, .narrow = true},
    {"16 bits, window", 1, 4, 2, 129, 193, 40, 64, .window = true, .window_left = 70, .window_right = 20, .narrow = true},
    {"16 bits, window of whole tiles", 1, 2, 2, 128, 128, 64, 40, .window = true, .window_left = 63, .window_right = 64,
     .causal = true, .narrow = true},
    {"16 bits, narrow window", 1, 1, 1, 128, 193, 72, 96, .window = true, .window_left = 3, .narrow = true},
    {"16 bits, padded", 5, 2, 1, 129, 65, 96, 72, .lengths = LENGTHS_PADDED, .causal = true, .narrow = true},
    {"16 bits, packed", 5, 2, 1, 127, 193, 104, 96, .lengths = LENGTHS_PACKED, .sinks = true, .narrow = true},
    {"16 bits, transposed", 2, 3, 3, 63, 65, 128, 104, .layout = LAYOUT_BLHD, .causal = true, .narrow = true},
    {"16 bits, expanded", 2, 2, 2, 65, 64, 136, 160, .layout = LAYOUT_EXPANDED, .narrow = true},
    {"16 bits, packed, wide rows", 4, 2, 1, 65, 129, 192, 136, .lengths = LENGTHS_PACKED, .causal = true, .alibi = 2,
     .narrow = true},
    {"16 bits, wide rows", 1, 2, 1, 129, 127, 200, 192, .causal = true, .narrow = true},
    {"16 bits, widest rows", 1, 1, 1, 64, 193, 256, 200, .window = true, .window_left = 129, .narrow = true},
    {"16 bits, large scores", 1, 2, 1, 65, 193, 64, 72, .magnitude = 4000, .causal = true, .d_lse = true, .narrow = true},
    {"16 bits, rows masked by -1e9", 1, 2, 1, 65, 193, 64, 72, .bias = "hq~", .wide_extras = true, .narrow = true},
    {"16 bits, softcap", 1, 2, 1, 65, 127, 72, 80, .softcap = 1.5, .magnitude = 5, .narrow = true},
    {"16 bits, bias with -inf", 1, 2, 1, 127, 129, 40, 24, .bias = "hqk-", .narrow = true},
    // One feature alone, head_dims of 64 and 128: kernels of their own. Bias: rows of whole 16 bytes.
    {"16 bits, softcap of near scores", 1, 2, 1, 65, 193, 128, .softcap = 20, .narrow = true},
    {"16 bits, softcap, grouped heads", 1, 4, 2, 130, 129, 64, .softcap = 1.5, .magnitude = 5, .causal = true, .narrow = true},
    {"16 bits, tiny softcap", 1, 2, 1, 65, 127, 64, .softcap = 1e-8, .narrow = true},
    {"16 bits, slopes", 2, 4, 2, 129, 193, 64, .alibi = 2, .causal = true, .const_extras = true, .narrow = true},
    {"16 bits, slopes, full", 1, 2, 1, 193, 129, 104, 128, .alibi = 1, .const_extras = true, .narrow = true},
    {"16 bits, bias", 2, 4, 2, 129, 136, 64, .bias = "bhqk", .narrow = true},
    {"16 bits, bias, transposed", 2, 2, 2, 65, 136, 64, .bias = "bhqk", .layout = LAYOUT_BLHD, .narrow = true},
    {"16 bits, bias, causal", 1, 2, 1, 200, 264, 128, .bias = "bhqk", .causal = true, .narrow = true},
    {"16 bits, bias, padded", 3, 2, 1, 129, 136, 104, .bias = "bhqk", .lengths = LENGTHS_PADDED, .narrow = true},
    {"16 bits, bias without gradient", 1, 2, 1, 129, 200, 128, .bias = "hqk-", .window = true, .window_left = 90,
     .window_right = 20, .const_extras = true, .narrow = true},
    {"16 bits, bias of one batch", 1, 2, 1, 129, 200, 128, .bias = "hqk", .causal = true, .narrow = true},
    {"16 bits, bias of all batches", 2, 2, 2, 70, 200, 64, .bias = "hqk", .causal = true, .narrow = true},
    {"16 bits, dropout", 1, 4, 2, 129, 193, 64, .dropout_p = 0.3, .causal = true, .narrow = true},
    {"16 bits, dropout, full", 2, 2, 2, 65, 129, 128, .dropout_p = 0.1, .narrow = true},
    {"16 bits, dropout, wide rows", 1, 1, 1, 65, 129, 160, 136, .dropout_p = 0.3, .causal = true, .narrow = true},
    {"16 bits, everything", 4, 4, 2, 129, 65, 24, 32, .causal = true, .window = true, .window_left = 60, .window_right = 3,
     .softcap = 3, .bias = "bhqk-", .alibi = 2, .sinks = true, .dropout_p = 0.2, .lengths = LENGTHS_PADDED,
     .layout = LAYOUT_BLHD, .d_lse = true, .narrow = true},
    {"16 bits, everything, wide rows", 3, 2, 1, 65, 129, 136, 256, .window = true, .window_left = 100, .window_right = 30,
     .softcap = 3, .bias = "qk-", .alibi = 1, .sinks = true, .dropout_p = 0.2, .lengths = LENGTHS_PADDED,
     .wide_extras = true, .d_lse = true, .narrow = true},
};
// clang-format on

static const double kUnitRoundoff[] = {0x1p-24, 0x1p-53, 0x1p-11, 0x1p-8}; // by fa_dtype

static double min_of(double a, double b) { return a < b ? a : b; }
static double max_of(double a, double b) { return a > b ? a : b; }

static double largest(const view *v) {
    double most = 0;
    for (int64_t i = 0; i < view_size(v); ++i)
        if (isfinite(view_at(v, i))) most = max_of(most, fabs(view_at(v, i)));
    return most;
}

// What d_s = P (d_p - delta) cancels to, at most, carried to gradient id: P may be 1 where a row sees few keys.
static double cancelled(const problem *oracle, view_id id) {
    const fa_forward_args *args = &oracle->args.forward;
    const view *v = oracle->views;
    const double d_s = largest(&v[VIEW_D_O]) * largest(&v[VIEW_V]) * sqrt((double)args->head_dim_v) / 4;
    const double rows = sqrt((double)args->seqlen_q * (double)(args->heads_q / args->heads_kv));
    double summed = 1; // entries of d_s behind one of d_bias
    for (int axis = 0; axis < 4; ++axis)
        if (v[VIEW_BIAS].data && v[VIEW_BIAS].strides[axis] == 0) summed *= (double)v[VIEW_BIAS].sizes[axis];
    switch (id) {
    case VIEW_D_Q: return d_s * args->softmax_scale * largest(&v[VIEW_K]);
    case VIEW_D_K: return d_s * args->softmax_scale * largest(&v[VIEW_Q]) * rows;
    case VIEW_D_BIAS: return d_s * sqrt(summed);
    case VIEW_D_SLOPES: return d_s * (double)args->seqlen_k;
    default: return 0;
    }
}

// Rounding of what is stored, and of the arithmetic: as an exponent's error is absolute, it grows with the scores.
static double tolerance(const problem *p, const problem *oracle, view_id id) {
    const fa_dtype dtype = p->args.forward.dtype;
    const double arithmetic = kUnitRoundoff[dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32];
    const double inputs = id == VIEW_LSE ? 0 : kUnitRoundoff[dtype];
    const double storage = max_of(inputs, kUnitRoundoff[p->views[id].dtype]);
    const double scores = id == VIEW_LSE ? 0 : largest(&oracle->views[VIEW_LSE]), lost = cancelled(oracle, id);
    const double scale = max_of(largest(&oracle->views[id]), id == VIEW_LSE ? 1 : 0.1);
    return scale * 8 * storage + lost * inputs + max_of(scale, lost) * 32 * arithmetic * (4 + scores);
}

static void expect_close(const problem *p, const problem *oracle, view_id id) {
    const view *x = &p->views[id], *ref = &oracle->views[id];
    const double most = tolerance(p, oracle, id);
    if (view_size(x) == 0) return;
    double worst = 0, sum = 0;
    int64_t worst_at = 0, infinities = 0;
    for (int64_t i = 0; i < view_size(x); ++i) {
        const double got = view_at(x, i), wanted = view_at(ref, i);
        if (isinf(wanted) || isinf(got)) {
            infinities += got != wanted;
            continue;
        }
        const double error = isnan(got) ? INFINITY : fabs(got - wanted);
        sum += min_of(error, 1e30);
        if (error > worst) worst = error, worst_at = i;
    }
    const double mean = sum / (double)view_size(x);
    expect(worst <= most, "%s[%lld]: %.9g instead of %.9g; largest error %.3g, allowed %.3g", kViewNames[id],
           (long long)worst_at, view_at(x, worst_at), view_at(ref, worst_at), worst, most);
    expect(mean <= most / 4, "%s: mean error %.3g, allowed %.3g", kViewNames[id], mean, most / 4);
    expect(infinities == 0, "%s: infinite in %lld wrong places", kViewNames[id], (long long)infinities);
}

static void expect_same_bits(const problem *a, const problem *b, view_id id) {
    const view *v = &a->views[id];
    expect(memcmp(v->data, b->views[id].data, (size_t)(v->elements * fa_dtype_bytes(v->dtype))) == 0,
           "%s: not the same bits in a second run", kViewNames[id]);
}

// What a kernel must not refuse, said apart from what it does refuse. Tensors are aligned.
static bool promises(fa_impl impl, const attention_case *c, fa_dtype dtype) {
    const int dv = c->head_dim_v ? c->head_dim_v : c->head_dim;
    if (impl == FA_SPLIT) return dtype != FA_FLOAT64;
    if (impl == FA_TENSOR_CORE) {
        const int vector = dtype == FA_FLOAT32 ? 4 : 8, widest = dtype == FA_FLOAT32 ? 128 : 256;
        return dtype != FA_FLOAT64 && c->head_dim % vector == 0 && dv % vector == 0 &&
               max_of(c->head_dim, dv) <= widest && c->layout != LAYOUT_GAPS;
    }
    return impl == FA_NAIVE || impl == FA_FUSED;
}

static void run_kernel(const attention_case *c, fa_dtype dtype, const fa_kernel_info *kernel, const problem *oracle) {
    const bool gpu = kernel->device == FA_CUDA;
    const placement here = gpu ? GPU_ALIGNED : FLUSH_START;
    placement elsewhere = gpu ? GPU_UNALIGNED : FLUSH_END;
    problem p = problem_make(c, dtype, kernel->impl, false, here), other = p;
    test_begin("%s, %s, %s", c->name, fa_dtype_name(dtype), kernel->name);
    if (!problem_serves(&p, FA_FORWARD)) {
        expect(!promises(kernel->impl, c, dtype), "%s", fa_error_text());
        return;
    }
    problem_run(&p, (fa_workers){0}, here);
    if (!g_sanitize) {
        other = problem_make(c, dtype, kernel->impl, false, elsewhere);
        if (!problem_serves(&other, FA_FORWARD)) // for where it lies: as far from where cudaMalloc aligns as served
            other = problem_make(c, dtype, kernel->impl, false, elsewhere = GPU_VECTORS);
        problem_run(&other, fa_posix_workers(3), elsewhere);
    }
    const bool has_backward = problem_serves(&p, FA_BACKWARD);
    expect(has_backward || kernel->impl == FA_SPLIT || !promises(kernel->impl, c, dtype), "%s", fa_error_text());
    const view_id end = has_backward ? VIEW_COUNT : VIEW_D_Q;
    for (view_id id = VIEW_FIRST_OUTPUT; id < end; ++id)
        if (p.views[id].data) {
            expect_close(&p, oracle, id);
            expect_same_bits(&p, &other, id);
        }
}

static void run_case(const attention_case *c, fa_dtype dtype, fa_device device) {
    test_begin("%s, %s, reference", c->name, fa_dtype_name(dtype));
    problem oracle = problem_make(c, dtype, FA_REFERENCE, true, FLUSH_END);
    problem_run(&oracle, (fa_workers){0}, FLUSH_END);
    for (int32_t i = 0; i < fa_kernel_count(); ++i) {
        fa_kernel_info kernel;
        fa_kernel_describe(i, &kernel);
        if (kernel.device == device && kernel.impl != FA_REFERENCE) run_kernel(c, dtype, &kernel, &oracle);
    }
    guarded_release_all();
}

// Tensors that are not aligned are no kernel's on tensor cores, but auto's all the same.
static void test_unaligned_by_auto(void) {
    const attention_case c = {"unaligned, auto", 2, 4, 2, 65, 70, 64, 72, .causal = true, .bias = "hqk", .d_lse = true};
    for (fa_dtype dtype = FA_FLOAT16; dtype <= FA_BFLOAT16; ++dtype) {
        test_begin("%s, %s", c.name, fa_dtype_name(dtype));
        problem oracle = problem_make(&c, dtype, FA_REFERENCE, true, FLUSH_END);
        problem_run(&oracle, (fa_workers){0}, FLUSH_END);
        problem p = problem_make(&c, dtype, FA_TENSOR_CORE, false, GPU_UNALIGNED);
        expect(!problem_serves(&p, FA_FORWARD) && strstr(fa_error_text(), "rows of whole 16 bytes"), "refused: %s",
               fa_error_text());
        p.args.forward.impl = FA_AUTO;
        problem_run(&p, (fa_workers){0}, GPU_UNALIGNED);
        for (view_id id = VIEW_FIRST_OUTPUT; id < VIEW_COUNT; ++id)
            if (p.views[id].data) expect_close(&p, &oracle, id);
        guarded_release_all();
    }
}

static uint64_t g_random = 1;
static int draw(int count) { // in [0, count)
    g_random = g_random * 6364136223846793005u + 1442695040888963407u;
    return (int)((g_random >> 33) % (uint64_t)count);
}

static attention_case random_case(void) {
    static const char *const kBias[] = {NULL, NULL, NULL, "", "bhqk", "hk", "bq", "qk-"};
    static const double kSoftcaps[] = {0, 0, 2, 30}, kDropouts[] = {0, 0, 0.1, 0.5};
    const int heads_kv = 1 + draw(2);
    attention_case c = {.batch = 1 + draw(3), .heads_q = heads_kv * (1 + draw(3)), .heads_kv = heads_kv};
    c.seqlen_q = draw(80), c.seqlen_k = draw(90), c.head_dim = 1 + draw(70), c.causal = draw(2);
    c.window = draw(3) == 0, c.window_left = draw(40) - 1, c.window_right = draw(40) - 1;
    c.softcap = kSoftcaps[draw(4)], c.dropout_p = kDropouts[draw(4)], c.bias = kBias[draw(8)], c.alibi = draw(3);
    c.sinks = draw(2), c.d_lse = draw(2), c.wide_extras = draw(2);
    c.lengths = (lengths)draw(LENGTHS_COUNT), c.layout = (layout)draw(LAYOUT_COUNT);
    c.head_dim_v = draw(2) ? c.head_dim : 1 + draw(90);
    if (draw(8) == 0) c.seqlen_k += 250;
    if (c.lengths == LENGTHS_PACKED) c.bias = NULL;
    return c;
}

static bool is_slow(const attention_case *c) {
    return g_quick && c->batch * c->heads_q * c->seqlen_q * c->seqlen_k * c->head_dim > 100000;
}

static bool is_left_out(const attention_case *c, fa_dtype dtype, int number) {
    const bool has_16_bits = dtype == FA_FLOAT16 || dtype == FA_BFLOAT16;
    if (c->narrow && !has_16_bits) return true;
    if (!g_sanitize || !g_quick) return is_slow(c);
    return (c->narrow ? FA_FLOAT16 + number % 2 : number % 4) != (int)dtype; // each case in one dtype
}

void test_attention(fa_device device) {
    for (size_t i = 0; i < sizeof kCases / sizeof kCases[0]; ++i)
        for (fa_dtype dtype = FA_FLOAT32; dtype <= FA_BFLOAT16; ++dtype)
            if (!is_left_out(&kCases[i], dtype, (int)i)) run_case(&kCases[i], dtype, device);
    if (device == FA_CUDA) test_unaligned_by_auto();
    for (int i = 0; i < (g_sanitize ? 0 : g_quick ? 10 : 60); ++i) {
        attention_case c = random_case();
        char name[160];
        snprintf(name, sizeof name, "random case %d", i);
        c.name = name;
        if (!is_slow(&c)) run_case(&c, (fa_dtype)(i % 4), device);
    }
}
