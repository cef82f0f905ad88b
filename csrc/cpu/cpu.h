// What the CPU rooms know of each other: kernels, the tables of one instruction set, and the loop that runs their tasks.
#ifndef FA_CPU_H
#define FA_CPU_H

#include "cpu/convert.h"
#include "flash_attention.h"
#include "sequence.h"
#include "sizes.h"

#if defined(__x86_64__)
#define FA_X86 1
#else
#define FA_X86 0
#endif

typedef struct fa_cpu_forward {
    size_t (*workspace_bytes)(const fa_forward_args *args);
    void (*run)(const fa_forward_args *args);
} fa_cpu_forward;

typedef struct fa_cpu_backward {
    size_t (*workspace_bytes)(const fa_backward_args *args);
    void (*run)(const fa_backward_args *args);
} fa_cpu_backward;

typedef struct fa_cpu_kvcache {
    size_t (*workspace_bytes)(const fa_kvcache_args *args);
    void (*run)(const fa_kvcache_args *args);
} fa_cpu_kvcache;

// The kernels of one instruction set, indexed by fa_dtype.
typedef struct fa_cpu_isa_kernels {
    const char *name;
    const fa_cpu_forward *naive_forward[4], *fused_forward[4];
    const fa_cpu_backward *naive_backward[4], *fused_backward[4];
    const fa_cpu_kvcache *kvcache[4];
} fa_cpu_isa_kernels;

const fa_cpu_isa_kernels *fa_cpu_kernels(void); // NULL, with fa_error_text(), where FLASH_ATTENTION_ISA is wrong

// o = 0, lse = -inf (d_q = d_k = d_v = 0) in the rows that belong to no sequence.
void fa_cpu_fill_padding(const fa_forward_args *args);
void fa_cpu_fill_gradient_padding(const fa_backward_args *args);

extern const fa_cpu_forward fa_reference_forward;
extern const fa_cpu_backward fa_reference_backward;
extern const fa_cpu_kvcache fa_reference_kvcache;

// Runs task(arg, index, worker) for every index in [0, count) on the workers: each draws the next index when it is free.
// worker in [0, fa_worker_count()).
void fa_parallel_for(const fa_workers *workers, int64_t count, void (*task)(void *arg, int64_t index, int32_t worker),
                     void *arg);
static inline int32_t fa_worker_count(const fa_workers *workers) {
    return workers->run && workers->count > 1 ? workers->count : 1;
}

#endif
