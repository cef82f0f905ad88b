#define _POSIX_C_SOURCE 200809L
#include "options.h"

#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char kUsage[] = "usage: attention_bench [options]\n"
                             "  --device NAME    cpu, cuda                              cpu\n"
                             "  --batch N        sequences                              1\n"
                             "  --heads N        query heads                            8\n"
                             "  --heads-kv N     key and value heads                    as --heads\n"
                             "  --seqlen N       queries and keys of a sequence         1024\n"
                             "  --seqlen-k N     keys, where they differ                as --seqlen\n"
                             "  --head-dim N     of q, k and v, 1 to 512                64\n"
                             "  --head-dim-v N   of v, where it differs                 as --head-dim\n"
                             "  --causal         a query sees no later key\n"
                             "  --dtype NAME     float32, float64, float16, bfloat16    float32\n"
                             "  --backward       time the gradients too\n"
                             "  --impl NAME      time this kernel alone                 every one against naive\n"
                             "  --threads N      CPU threads                            all\n"
                             "  --iterations N   timed runs; their median is printed    10\n"
                             "  --warmup N       runs before them                       2\n"
                             "FLASH_ATTENTION_ISA=scalar|avx2|avx512|avx512_bf16 lowers the CPU's instruction set.\n";

void die(const char *format, ...) {
    va_list values;
    va_start(values, format);
    fputs("attention_bench: ", stderr);
    vfprintf(stderr, format, values);
    va_end(values);
    fputs("\n", stderr);
    exit(EXIT_FAILURE);
}

void check(fa_status status) {
    if (status != FA_OK) die("%s", fa_error_text());
}

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

static fa_device parse_device(const char *text) {
    if (strcmp(text, "cuda") == 0) return FA_CUDA;
    if (strcmp(text, "cpu") != 0) die("--device %s: must be cpu or cuda", text);
    return FA_CPU;
}

options parse_options(int argc, char **argv) {
    options opt = {.batch = 1, .heads = 8, .heads_kv = -1, .seqlen = 1024, .seqlen_k = -1, .head_dim = 64};
    opt.head_dim_v = -1, opt.threads = sysconf(_SC_NPROCESSORS_ONLN), opt.iterations = 10, opt.warmup = 2;
    int64_t *const numbers[] = {&opt.batch,    &opt.heads,      &opt.heads_kv, &opt.seqlen,     &opt.seqlen_k,
                                &opt.head_dim, &opt.head_dim_v, &opt.threads,  &opt.iterations, &opt.warmup};
    enum { kWarmup = 9 };
    const struct option known[] = {
        {"batch", 1, NULL, 0},      {"heads", 1, NULL, 1},      {"heads-kv", 1, NULL, 2}, {"seqlen", 1, NULL, 3},
        {"seqlen-k", 1, NULL, 4},   {"head-dim", 1, NULL, 5},   {"threads", 1, NULL, 7},  {"iterations", 1, NULL, 8},
        {"head-dim-v", 1, NULL, 6}, {"dtype", 1, NULL, 't'},    {"help", 0, NULL, 'h'},   {"warmup", 1, NULL, kWarmup},
        {"causal", 0, NULL, 'c'},   {"backward", 0, NULL, 'B'}, {"impl", 1, NULL, 'i'},   {"device", 1, NULL, 'd'},
        {NULL, 0, NULL, 0},
    };
    int index = 0;
    for (int c; (c = getopt_long(argc, argv, "h", known, &index)) != -1;) {
        switch (c) {
        case 'd': opt.device = parse_device(optarg); break;
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
    if (opt.head_dim_v < 0) opt.head_dim_v = opt.head_dim;
    return opt;
}
