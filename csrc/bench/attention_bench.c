// Stand-alone driver: random Q, K, V; naive against fused. Needs neither Python nor torch. attention_bench --help.
#define _POSIX_C_SOURCE 200809L
#include <getopt.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "flash_attention.h"

static const char kUsage[] = "usage: attention_bench [options]\n"
                             "  --batch N        sequences                              1\n"
                             "  --heads N        query heads                            8\n"
                             "  --heads-kv N     key and value heads                    as --heads\n"
                             "  --seqlen N       queries and keys of a sequence         1024\n"
                             "  --seqlen-k N     keys, where they differ                as --seqlen\n"
                             "  --head-dim N     of q, k and v, 1 to 512                64\n"
                             "  --causal         a query sees no later key\n"
                             "  --dtype NAME     float32, float64, float16, bfloat16    float32\n"
                             "  --backward       time the gradients too\n"
                             "  --impl NAME      time this kernel alone                 naive and fused\n"
                             "  --threads N      CPU threads                            all\n"
                             "  --iterations N   timed runs; their median is printed    10\n"
                             "  --warmup N       runs before them                       2\n"
                             "FLASH_ATTENTION_ISA=scalar|avx2|avx512|avx512_bf16 lowers the instruction set.\n";

static _Noreturn void die(const char *format, ...) {
    va_list values;
    va_start(values, format);
    fputs("attention_bench: ", stderr);
    vfprintf(stderr, format, values);
    va_end(values);
    fputs("\n", stderr);
    exit(EXIT_FAILURE);
}

static void check(fa_status status) {
    if (status != FA_OK) die("%s", fa_error_text());
}

static void *allocate(size_t bytes) {
    void *data = aligned_alloc(FA_WORKSPACE_ALIGNMENT, (bytes / FA_WORKSPACE_ALIGNMENT + 1) * FA_WORKSPACE_ALIGNMENT);
    if (!data) die("%.1f GB: out of memory", (double)bytes * 1e-9);
    memset(data, 0, bytes); // touches the pages
    return data;
}

// ---- options --------------------------------------------------------------------------------------------------------

typedef struct options {
    int64_t batch, heads, heads_kv, seqlen, seqlen_k, head_dim, threads, iterations, warmup;
    int causal, backward;
    fa_dtype dtype;
    fa_impl impl; // FA_AUTO: naive and fused
} options;

static int64_t parse_number(const char *name, const char *text, int64_t least) {
    char *end = NULL;
    const long long value = strtoll(text, &end, 10);
    if (end == text || *end || value < least || value > INT32_MAX)
        die("--%s %s: must be a whole number from %lld to %d", name, text, (long long)least, INT32_MAX);
    return value;
}

static fa_dtype parse_dtype(const char *text) {
    fa_dtype dtype = FA_FLOAT32;
    while (dtype <= FA_BFLOAT16 && strcmp(text, fa_dtype_name(dtype)) != 0) ++dtype;
    if (dtype > FA_BFLOAT16) die("--dtype %s: must be float32, float64, float16 or bfloat16", text);
    return dtype;
}

static options parse_options(int argc, char **argv) {
    options opt = {.batch = 1, .heads = 8, .heads_kv = -1, .seqlen = 1024, .seqlen_k = -1, .head_dim = 64};
    opt.threads = sysconf(_SC_NPROCESSORS_ONLN), opt.iterations = 10, opt.warmup = 2;
    int64_t *const numbers[] = {&opt.batch,    &opt.heads,   &opt.heads_kv,   &opt.seqlen, &opt.seqlen_k,
                                &opt.head_dim, &opt.threads, &opt.iterations, &opt.warmup};
    enum { kWarmup = 8 };
    const struct option known[] = {
        {"batch", 1, NULL, 0},    {"heads", 1, NULL, 1},      {"heads-kv", 1, NULL, 2},     {"seqlen", 1, NULL, 3},
        {"seqlen-k", 1, NULL, 4}, {"head-dim", 1, NULL, 5},   {"threads", 1, NULL, 6},      {"iterations", 1, NULL, 7},
        {"causal", 0, NULL, 'c'}, {"backward", 0, NULL, 'B'}, {"warmup", 1, NULL, kWarmup}, {"dtype", 1, NULL, 't'},
        {"impl", 1, NULL, 'i'},   {"help", 0, NULL, 'h'},     {NULL, 0, NULL, 0},
    };
    int index = 0;
    for (int c; (c = getopt_long(argc, argv, "h", known, &index)) != -1;) {
        switch (c) {
        case 't': opt.dtype = parse_dtype(optarg); break;
        case 'i': check(fa_impl_parse(optarg, &opt.impl)); break;
        case 'c': opt.causal = 1; break;
        case 'B': opt.backward = 1; break;
        case 'h': fputs(kUsage, stdout); exit(EXIT_SUCCESS);
        case '?': fputs(kUsage, stderr); exit(EXIT_FAILURE);
        default: *numbers[c] = parse_number(known[index].name, optarg, c == kWarmup ? 0 : 1); break;
        }
    }
    if (optind < argc) die("%s: not an option; see --help", argv[optind]);
    if (opt.heads_kv < 0) opt.heads_kv = opt.heads;
    if (opt.seqlen_k < 0) opt.seqlen_k = opt.seqlen;
    return opt;
}

// ---- one problem ----------------------------------------------------------------------------------------------------

static size_t dtype_bytes(fa_dtype dtype) { return dtype == FA_FLOAT64 ? 8 : dtype == FA_FLOAT32 ? 4 : 2; }

static double value_at(const void *data, fa_dtype dtype, int64_t i) { // finite
    if (dtype == FA_FLOAT32) return ((const float *)data)[i];
    if (dtype == FA_FLOAT64) return ((const double *)data)[i];
    const uint16_t half = ((const uint16_t *)data)[i];
    if (dtype == FA_BFLOAT16) {
        const uint32_t bits = (uint32_t)half << 16;
        float x;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
    const int exponent = half >> 10 & 0x1F, mantissa = half & 0x3FF;
    return ldexp(exponent ? mantissa | 0x400 : mantissa, (exponent ? exponent : 1) - 25) * (half >> 15 ? -1 : 1);
}

// Uniform in (-2, -1] and [1, 2): sign and mantissa are random bits, so that every dtype is made alike.
static void fill_random(void *data, fa_dtype dtype, int64_t count) {
    static uint64_t state = 1;
    for (int64_t i = 0; i < count; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const uint64_t bits = state >> 12 | state << 63;
        switch (dtype) {
        case FA_FLOAT32: ((uint32_t *)data)[i] = (uint32_t)(bits >> 32 & 0x807FFFFF) | 0x3F800000; break;
        case FA_FLOAT64: ((uint64_t *)data)[i] = (bits & 0x800FFFFFFFFFFFFF) | 0x3FF0000000000000; break;
        case FA_FLOAT16: ((uint16_t *)data)[i] = (uint16_t)((bits >> 48 & 0x83FF) | 0x3C00); break;
        case FA_BFLOAT16: ((uint16_t *)data)[i] = (uint16_t)((bits >> 48 & 0x807F) | 0x3F80); break;
        }
    }
}

static int64_t elements(const options *opt, int keys) {
    return opt->batch * (keys ? opt->heads_kv * opt->seqlen_k : opt->heads * opt->seqlen) * opt->head_dim;
}

static fa_tensor new_tensor(const options *opt, int keys, int random) {
    const int64_t stride_h = (keys ? opt->seqlen_k : opt->seqlen) * opt->head_dim;
    const fa_tensor t = {allocate((size_t)elements(opt, keys) * dtype_bytes(opt->dtype)),
                         (keys ? opt->heads_kv : opt->heads) * stride_h, stride_h, opt->head_dim};
    if (random) fill_random(t.data, opt->dtype, elements(opt, keys));
    return t;
}

static fa_backward_args new_problem(const options *opt) {
    fa_backward_args args = {.deterministic = 1};
    fa_forward_args *forward = &args.forward;
    forward->impl = opt->impl, forward->dtype = opt->dtype, forward->causal = opt->causal;
    forward->batch = opt->batch, forward->heads_q = opt->heads, forward->heads_kv = opt->heads_kv;
    forward->seqlen_q = opt->seqlen, forward->seqlen_k = opt->seqlen_k;
    forward->head_dim = forward->head_dim_v = opt->head_dim;
    forward->softmax_scale = 1 / sqrt((double)opt->head_dim);
    forward->window_left = forward->window_right = -1;
    forward->workers = fa_posix_workers((int32_t)opt->threads);
    size_t bytes; // what is refused is refused before anything is allocated
    check(fa_forward_workspace_bytes(forward, &bytes));
    const double rows = (double)(opt->heads > opt->heads_kv ? opt->heads : opt->heads_kv) * (double)opt->batch;
    if (rows * (double)(opt->seqlen + opt->seqlen_k) * (double)opt->head_dim > 0x1p44)
        die("the tensors: out of memory");
    forward->q = new_tensor(opt, 0, 1);
    forward->k = new_tensor(opt, 1, 1);
    forward->v = new_tensor(opt, 1, 1);
    if (opt->backward) args.d_o = new_tensor(opt, 0, 1);
    return args;
}

// The same inputs for another kernel: outputs and workspace of its own.
static fa_backward_args for_impl(const options *opt, fa_backward_args args, fa_impl impl) {
    size_t forward_bytes = 0, backward_bytes = 0;
    args.forward.impl = impl;
    args.forward.o = new_tensor(opt, 0, 0);
    args.forward.lse = (fa_tensor){allocate((size_t)(opt->batch * opt->heads * opt->seqlen) * sizeof(double)),
                                   opt->heads * opt->seqlen, opt->seqlen, 1};
    check(fa_forward_workspace_bytes(&args.forward, &forward_bytes));
    if (opt->backward) {
        args.d_q = new_tensor(opt, 0, 0);
        args.d_k = new_tensor(opt, 1, 0);
        args.d_v = new_tensor(opt, 1, 0);
        check(fa_backward_workspace_bytes(&args, &backward_bytes));
    }
    args.forward.workspace_bytes = forward_bytes > backward_bytes ? forward_bytes : backward_bytes;
    args.forward.workspace = allocate(args.forward.workspace_bytes);
    return args;
}

// ---- measurement ----------------------------------------------------------------------------------------------------

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_ms(const options *opt, const fa_backward_args *args, fa_pass pass) {
    double *ms = allocate((size_t)opt->iterations * sizeof *ms);
    for (int64_t i = -opt->warmup; i < opt->iterations; ++i) {
        const double start = now_ms();
        check(pass == FA_FORWARD ? fa_forward(&args->forward) : fa_backward(args));
        if (i >= 0) ms[i] = now_ms() - start;
    }
    qsort(ms, (size_t)opt->iterations, sizeof *ms, by_value);
    const double median = (ms[(opt->iterations - 1) / 2] + ms[opt->iterations / 2]) / 2;
    free(ms);
    return median;
}

// 4 B Hq D FLOPs for each visible query-key pair; 2.5 times as many backward.
static double flops(const options *opt, fa_pass pass) {
    double pairs = 0;
    for (int64_t i = 0; i < opt->seqlen; ++i) {
        const int64_t visible = opt->causal ? i + opt->seqlen_k - opt->seqlen + 1 : opt->seqlen_k;
        pairs += (double)(visible < 0 ? 0 : visible > opt->seqlen_k ? opt->seqlen_k : visible);
    }
    return 4.0 * (double)(opt->batch * opt->heads * opt->head_dim) * pairs * (pass == FA_BACKWARD ? 2.5 : 1);
}

static double time_pass(const options *opt, const fa_backward_args *args, fa_pass pass) {
    const double ms = median_ms(opt, args, pass);
    const char *name = fa_impl_name(args->forward.impl);
    printf("%c%s%s: %.3f ms (%.1f GFLOP/s)\n", name[0] - 'a' + 'A', name + 1, pass == FA_BACKWARD ? " backward" : "",
           ms, flops(opt, pass) / ms * 1e-6);
    return ms;
}

static void print_rmse(const options *opt, const char *name, const fa_tensor *a, const fa_tensor *b, int keys) {
    double sum = 0;
    for (int64_t i = 0; i < elements(opt, keys); ++i) {
        const double difference = value_at(a->data, opt->dtype, i) - value_at(b->data, opt->dtype, i);
        sum += difference * difference;
    }
    printf("RMSE%s: %.3e\n", name, sqrt(sum / (double)elements(opt, keys)));
}

int main(int argc, char **argv) {
    const options opt = parse_options(argc, argv);
    const fa_backward_args problem = new_problem(&opt);
    printf("batch %lld, heads %lld (%lld), seqlen %lld x %lld, head_dim %lld, %s%s, %s, %d threads\n",
           (long long)opt.batch, (long long)opt.heads, (long long)opt.heads_kv, (long long)opt.seqlen,
           (long long)opt.seqlen_k, (long long)opt.head_dim, fa_dtype_name(opt.dtype), opt.causal ? ", causal" : "",
           fa_cpu_isa(), (int)problem.forward.workers.count);
    const fa_backward_args naive = for_impl(&opt, problem, opt.impl == FA_AUTO ? FA_NAIVE : opt.impl);
    const fa_backward_args fused = opt.impl == FA_AUTO ? for_impl(&opt, problem, FA_FUSED) : naive;
    for (fa_pass pass = FA_FORWARD; pass <= (opt.backward ? FA_BACKWARD : FA_FORWARD); ++pass) {
        const double naive_ms = time_pass(&opt, &naive, pass);
        if (opt.impl != FA_AUTO) continue; // the one kernel asked for
        const double fused_ms = time_pass(&opt, &fused, pass);
        printf("Speedup: %.2fx\n", naive_ms / fused_ms);
        if (pass == FA_FORWARD) {
            print_rmse(&opt, "", &naive.forward.o, &fused.forward.o, 0);
        } else {
            print_rmse(&opt, " d_q", &naive.d_q, &fused.d_q, 0);
            print_rmse(&opt, " d_k", &naive.d_k, &fused.d_k, 1);
            print_rmse(&opt, " d_v", &naive.d_v, &fused.d_v, 1);
        }
    }
    return EXIT_SUCCESS;
}
