// Stand-alone driver: random Q, K, V; kernel against kernel, on the CPU or the GPU. Needs neither Python nor torch.
// attention_bench --help.
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bench/gpu.h"
#include "bench/options.h"
#include "cpu/convert.h"

// ---- memory ---------------------------------------------------------------------------------------------------------

static void *allocate_host(size_t bytes) { // NULL: there is not that much
    void *data = aligned_alloc(FA_WORKSPACE_ALIGNMENT, (bytes / FA_WORKSPACE_ALIGNMENT + 1) * FA_WORKSPACE_ALIGNMENT);
    if (data) memset(data, 0, bytes); // touches the pages
    return data;
}

static void *allocate(const options *opt, size_t bytes) {
    return opt->device == FA_CUDA ? gpu_allocate(bytes + 1) : allocate_host(bytes); // never NULL for 0 bytes
}

static void release(const options *opt, void *data) {
    if (opt->device == FA_CUDA)
        gpu_release(data);
    else
        free(data);
}

static void copy(const options *opt, void *to, const void *from, size_t bytes) {
    if (opt->device == FA_CUDA)
        gpu_copy(to, from, bytes);
    else
        memcpy(to, from, bytes);
}

static void fill(const options *opt, void *data, int byte, size_t bytes) {
    if (opt->device == FA_CUDA)
        gpu_fill(data, byte, bytes);
    else
        memset(data, byte, bytes);
}

static void *must_allocate(void *data, size_t bytes) {
    if (!data) die("%.1f GB: out of memory", (double)bytes * 1e-9);
    return data;
}

// ---- one problem ----------------------------------------------------------------------------------------------------

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
        case FA_FLOAT8_E4M3: break; // of caches alone
        }
    }
}

// Of (B, H, L, width), with the heads and rows of q, or of k.
static int64_t elements(const options *opt, int keys, int64_t width) {
    return opt->batch * (keys ? opt->heads_kv * opt->seqlen_k : opt->heads * opt->seqlen) * width;
}

static fa_tensor new_tensor(const options *opt, int keys, int64_t width) {
    const size_t bytes = (size_t)(elements(opt, keys, width) * fa_dtype_bytes(opt->dtype));
    const int64_t stride_h = (keys ? opt->seqlen_k : opt->seqlen) * width;
    return (fa_tensor){must_allocate(allocate(opt, bytes), bytes), (keys ? opt->heads_kv : opt->heads) * stride_h,
                       stride_h, width};
}

static fa_tensor new_input(const options *opt, int keys, int64_t width) {
    const fa_tensor t = new_tensor(opt, keys, width);
    const int64_t count = elements(opt, keys, width);
    const size_t bytes = (size_t)(count * fa_dtype_bytes(opt->dtype));
    void *values = must_allocate(allocate_host(bytes), bytes);
    fill_random(values, opt->dtype, count);
    copy(opt, t.data, values, bytes);
    free(values);
    return t;
}

static fa_backward_args new_problem(const options *opt) {
    fa_backward_args args = {.deterministic = 1};
    fa_forward_args *forward = &args.forward;
    forward->device = opt->device, forward->impl = opt->impl, forward->dtype = opt->dtype;
    forward->batch = opt->batch, forward->heads_q = opt->heads, forward->heads_kv = opt->heads_kv;
    forward->seqlen_q = opt->seqlen, forward->seqlen_k = opt->seqlen_k, forward->causal = opt->causal;
    forward->head_dim = opt->head_dim, forward->head_dim_v = opt->head_dim_v;
    forward->softmax_scale = 1 / sqrt((double)opt->head_dim);
    forward->window_left = forward->window_right = -1;
    forward->workers = fa_posix_workers((int32_t)opt->threads);
    size_t bytes; // what is refused is refused before anything is allocated
    check(fa_forward_workspace_bytes(forward, &bytes));
    const double rows = (double)(opt->heads > opt->heads_kv ? opt->heads : opt->heads_kv) * (double)opt->batch;
    if (rows * (double)(opt->seqlen + opt->seqlen_k) * FA_MAX_HEAD_DIM > 0x1p47) die("the tensors: out of memory");
    forward->q = new_input(opt, 0, opt->head_dim);
    forward->k = new_input(opt, 1, opt->head_dim);
    forward->v = new_input(opt, 1, opt->head_dim_v);
    forward->o = new_tensor(opt, 0, opt->head_dim_v);
    const size_t lse_bytes = (size_t)(elements(opt, 0, 1) * fa_dtype_bytes(fa_lse_dtype(forward)));
    forward->lse =
        (fa_tensor){must_allocate(allocate(opt, lse_bytes), lse_bytes), opt->heads * opt->seqlen, opt->seqlen, 1};
    if (opt->backward) {
        args.d_o = new_input(opt, 0, opt->head_dim_v);
        args.d_q = new_tensor(opt, 0, opt->head_dim);
        args.d_k = new_tensor(opt, 1, opt->head_dim);
        args.d_v = new_tensor(opt, 1, opt->head_dim_v);
    }
    return args;
}

// ---- measurement ----------------------------------------------------------------------------------------------------

typedef struct call {
    const fa_backward_args *args;
    fa_pass pass;
} call;

static void run(const void *context) {
    const call *c = context;
    check(c->pass == FA_FORWARD ? fa_forward(&c->args->forward) : fa_backward(c->args));
}

static double cpu_time_ms(void (*function)(const void *context), const void *context) {
    struct timespec start, stop;
    clock_gettime(CLOCK_MONOTONIC, &start);
    function(context);
    clock_gettime(CLOCK_MONOTONIC, &stop);
    return (double)(stop.tv_sec - start.tv_sec) * 1e3 + (double)(stop.tv_nsec - start.tv_nsec) * 1e-6;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// 2 FLOPs for each product of a visible query-key pair: QK' and PV, or QK', dO V', P' dO, dS K and dS' Q.
static double flops(const options *opt, fa_pass pass) {
    double pairs = 0;
    for (int64_t i = 0; i < opt->seqlen; ++i) {
        const int64_t visible = opt->causal ? i + opt->seqlen_k - opt->seqlen + 1 : opt->seqlen_k;
        pairs += (double)(visible < 0 ? 0 : visible > opt->seqlen_k ? opt->seqlen_k : visible);
    }
    const int64_t d = opt->head_dim, dv = opt->head_dim_v;
    return 2.0 * (double)(opt->batch * opt->heads * (pass == FA_FORWARD ? d + dv : 3 * d + 2 * dv)) * pairs;
}

// Prints the line that follows the kernel's name; returns the median in milliseconds.
static double measure(const options *opt, const fa_backward_args *args, fa_pass pass) {
    const size_t bytes = (size_t)opt->iterations * sizeof(double);
    double *ms = must_allocate(allocate_host(bytes), bytes);
    const call c = {args, pass};
    for (int64_t i = -opt->warmup; i < opt->iterations; ++i) {
        const double one = opt->device == FA_CUDA ? gpu_time_ms(run, &c) : cpu_time_ms(run, &c);
        if (i >= 0) ms[i] = one;
    }
    qsort(ms, (size_t)opt->iterations, sizeof *ms, by_value);
    const double median = (ms[(opt->iterations - 1) / 2] + ms[opt->iterations / 2]) / 2;
    const double gflops = flops(opt, pass) / median * 1e-6;
    printf("%.3f ms (%.1f %s), min %.3f, max %.3f\n", median, opt->device == FA_CUDA ? gflops * 1e-3 : gflops,
           opt->device == FA_CUDA ? "TFLOP/s" : "GFLOP/s", ms[0], ms[opt->iterations - 1]);
    free(ms);
    return median;
}

// ---- kernel against kernel ------------------------------------------------------------------------------------------

enum { kOutputs = 4 };
typedef struct output {
    const char *name;
    fa_pass pass;
    void *data;
    size_t bytes;
} output;

typedef struct comparison {
    output outputs[kOutputs];
    int output_count;
    double naive_ms[2];           // by fa_pass; 0: naive did not run
    void *naive_values[kOutputs]; // on the host
} comparison;

static output new_output(const options *opt, const char *name, fa_pass pass, const fa_tensor *t, int keys) {
    const int64_t width = t->stride_l;
    return (output){name, pass, t->data, (size_t)(elements(opt, keys, width) * fa_dtype_bytes(opt->dtype))};
}

static double rmse(const void *a, const void *b, fa_dtype dtype, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double difference = fa_load(a, dtype, i) - fa_load(b, dtype, i);
        sum += difference * difference;
    }
    return sqrt(sum / (double)count);
}

static void compare_with_naive(const options *opt, fa_impl impl, fa_pass pass, comparison *all) {
    for (int i = 0; i < all->output_count; ++i) {
        const output *x = &all->outputs[i];
        if (x->pass != pass) continue;
        void *values = must_allocate(allocate_host(x->bytes), x->bytes);
        copy(opt, values, x->data, x->bytes);
        if (impl == FA_NAIVE) {
            all->naive_values[i] = values;
        } else {
            printf("RMSE%s: %.3e\n", x->name,
                   rmse(all->naive_values[i], values, opt->dtype, (int64_t)x->bytes / fa_dtype_bytes(opt->dtype)));
            free(values);
        }
    }
}

// Returns whether it ran: naive's scores may not fit the memory, and not every kernel has a backward pass.
static int bench_pass(const options *opt, fa_backward_args *args, fa_pass pass, comparison *all) {
    const char *name = fa_impl_name(args->forward.impl);
    fa_forward_args *forward = &args->forward;
    printf("%c%s%s: ", name[0] - 'a' + 'A', name + 1, pass == FA_BACKWARD ? " backward" : "");
    fflush(stdout);
    if ((pass == FA_FORWARD ? fa_forward_workspace_bytes(forward, &forward->workspace_bytes)
                            : fa_backward_workspace_bytes(args, &forward->workspace_bytes)) != FA_OK) {
        puts(fa_error_text());
        return 0;
    }
    forward->workspace = allocate(opt, forward->workspace_bytes);
    if (!forward->workspace) {
        printf("needs %.1f GB of scratch, more memory than is free\n", (double)forward->workspace_bytes * 1e-9);
        return 0;
    }
    for (int i = 0; i < all->output_count; ++i) // with NaN: what the last kernel wrote is not this one's
        if (all->outputs[i].pass == pass) fill(opt, all->outputs[i].data, 0xFF, all->outputs[i].bytes);
    const double ms = measure(opt, args, pass);
    if (forward->impl == FA_NAIVE) all->naive_ms[pass] = ms;
    if (forward->impl != FA_NAIVE && all->naive_ms[pass] > 0) printf("Speedup: %.2fx\n", all->naive_ms[pass] / ms);
    if (all->naive_ms[pass] > 0) compare_with_naive(opt, forward->impl, pass, all);
    release(opt, forward->workspace);
    return 1;
}

static int is_wanted(const options *opt, const fa_kernel_info *kernel) {
    return kernel->device == opt->device &&
           (opt->impl == FA_AUTO ? kernel->impl != FA_REFERENCE : kernel->impl == opt->impl);
}

int main(int argc, char **argv) {
    const options opt = parse_options(argc, argv);
    if (opt.device == FA_CUDA && gpu_missing()) die("--device cuda: %s", gpu_missing());
    fa_backward_args args = new_problem(&opt);
    printf("batch %lld, heads %lld (%lld), seqlen %lld x %lld, head_dim %lld (%lld), %s%s, ", (long long)opt.batch,
           (long long)opt.heads, (long long)opt.heads_kv, (long long)opt.seqlen, (long long)opt.seqlen_k,
           (long long)opt.head_dim, (long long)opt.head_dim_v, fa_dtype_name(opt.dtype), opt.causal ? ", causal" : "");
    if (opt.device == FA_CUDA)
        printf("%s\n", gpu_name());
    else
        printf("%s, %d threads\n", fa_cpu_isa(), (int)args.forward.workers.count);
    comparison all = {.output_count = opt.backward ? kOutputs : 1,
                      .outputs = {new_output(&opt, "", FA_FORWARD, &args.forward.o, 0),
                                  new_output(&opt, " d_q", FA_BACKWARD, &args.d_q, 0),
                                  new_output(&opt, " d_k", FA_BACKWARD, &args.d_k, 1),
                                  new_output(&opt, " d_v", FA_BACKWARD, &args.d_v, 1)}};
    for (int32_t i = fa_kernel_count() - 1; i >= 0; --i) { // slowest first: the others are measured against naive
        fa_kernel_info kernel;
        check(fa_kernel_describe(i, &kernel));
        if (!is_wanted(&opt, &kernel)) continue;
        args.forward.impl = kernel.impl;
        if (bench_pass(&opt, &args, FA_FORWARD, &all) && opt.backward) bench_pass(&opt, &args, FA_BACKWARD, &all);
    }
    return EXIT_SUCCESS;
}
