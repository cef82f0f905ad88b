// What attention_bench is asked for, and how it refuses.
#ifndef FA_BENCH_OPTIONS_H
#define FA_BENCH_OPTIONS_H

#include "flash_attention.h"

typedef struct options {
    fa_device device;
    int64_t batch, heads, heads_kv, seqlen, seqlen_k, head_dim, head_dim_v, threads, iterations, warmup;
    int causal, backward;
    fa_dtype dtype;
    fa_impl impl; // FA_AUTO: every kernel of the device
} options;

options parse_options(int argc, char **argv);
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
void check(fa_status status); // dies with its sentence

#endif
