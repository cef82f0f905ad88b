// Which instruction set, and the CPU's rows of the kernel table.
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "error.h"
#include "kernel_table.h"

#define DECLARE_FUSED(NAME)                                                                                            \
    extern const fa_cpu_forward fa_##NAME##_fused_forward;                                                             \
    extern const fa_cpu_backward fa_##NAME##_fused_backward;                                                           \
    extern const fa_cpu_kvcache fa_##NAME##_kvcache;
#define DECLARE_INSTANCE(NAME)                                                                                         \
    extern const fa_cpu_forward fa_##NAME##_naive_forward;                                                             \
    extern const fa_cpu_backward fa_##NAME##_naive_backward;                                                           \
    DECLARE_FUSED(NAME)

DECLARE_INSTANCE(scalar_f32)
DECLARE_INSTANCE(scalar_f64)
#if FA_X86
DECLARE_INSTANCE(avx2_f32)
DECLARE_INSTANCE(avx2_f64)
DECLARE_INSTANCE(avx512_f32)
DECLARE_INSTANCE(avx512_f64)
DECLARE_FUSED(avx512bf16_bf16)
#endif

// Indexed by dtype. float64 has its own arithmetic; 16-bit inputs are widened to float32, but where BF16 names another
// instance.
#define BY_DTYPE(ISA, BF16, KERNEL)                                                                                    \
    {&fa_##ISA##_f32_##KERNEL, &fa_##ISA##_f64_##KERNEL, &fa_##ISA##_f32_##KERNEL, &fa_##BF16##_##KERNEL}
#define ISA_ROW(NAME, ISA, BF16)                                                                                       \
    {NAME,                                                                                                             \
     BY_DTYPE(ISA, ISA##_f32, naive_forward),                                                                          \
     BY_DTYPE(ISA, BF16, fused_forward),                                                                               \
     BY_DTYPE(ISA, ISA##_f32, naive_backward),                                                                         \
     BY_DTYPE(ISA, BF16, fused_backward),                                                                              \
     BY_DTYPE(ISA, BF16, kvcache)}

// Slowest first: an instruction set implies those before it.
static const fa_cpu_isa_kernels kIsas[] = {
    ISA_ROW("scalar", scalar, scalar_f32),
#if FA_X86
    ISA_ROW("avx2", avx2, avx2_f32),
    ISA_ROW("avx512", avx512, avx512_f32),
    ISA_ROW("avx512_bf16", avx512, avx512bf16_bf16),
#endif
};
enum { kIsaCount = sizeof kIsas / sizeof kIsas[0] };

static int best_isa(void) {
    int best = 0;
#if FA_X86
    __builtin_cpu_init(); // also asks the operating system which registers it saves
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = 1;
    if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        best = 2;
    if (best == 2 && __builtin_cpu_supports("avx512bf16")) best = 3;
#endif
    return best;
}

const fa_cpu_isa_kernels *fa_cpu_kernels(void) {
    static _Atomic(const fa_cpu_isa_kernels *) chosen; // every thread computes the same value
    const fa_cpu_isa_kernels *isa = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (isa) return isa;
    const int best = best_isa();
    isa = &kIsas[best];
    const char *wanted = getenv("FLASH_ATTENTION_ISA");
    if (wanted && *wanted) {
        int found = 0;
        while (found < kIsaCount && strcmp(kIsas[found].name, wanted) != 0) ++found;
        if (found == kIsaCount || found > best) {
            fa_fail(FA_ERROR_VALUE, "FLASH_ATTENTION_ISA=%s: %s; this machine has scalar%s%s%s", wanted,
                    found == kIsaCount ? "no such instruction set" : "more than this machine has",
                    best > 0 ? ", avx2" : "", best > 1 ? ", avx512" : "", best > 2 ? ", avx512_bf16" : "");
            return NULL;
        }
        isa = &kIsas[found];
    }
    atomic_store_explicit(&chosen, isa, memory_order_relaxed);
    return isa;
}

const char *fa_cpu_isa(void) {
    const fa_cpu_isa_kernels *isa = fa_cpu_kernels();
    return isa ? isa->name : NULL;
}

// The gate has seen to it that fa_cpu_kernels() is not NULL.
#define CPU_KERNEL(NAME, FORWARD, BACKWARD)                                                                            \
    static size_t NAME##_forward_bytes(const fa_forward_args *args) { return (FORWARD)->workspace_bytes(args); }       \
    static fa_status NAME##_forward(const fa_forward_args *args) {                                                     \
        fa_cpu_fill_padding(args);                                                                                     \
        (FORWARD)->run(args);                                                                                          \
        return FA_OK;                                                                                                  \
    }                                                                                                                  \
    static size_t NAME##_backward_bytes(const fa_backward_args *args) { return (BACKWARD)->workspace_bytes(args); }    \
    static fa_status NAME##_backward(const fa_backward_args *args) {                                                   \
        fa_cpu_fill_gradient_padding(args);                                                                            \
        (BACKWARD)->run(args);                                                                                         \
        return FA_OK;                                                                                                  \
    }
CPU_KERNEL(fused, fa_cpu_kernels()->fused_forward[args->dtype], fa_cpu_kernels()->fused_backward[args->forward.dtype])
CPU_KERNEL(naive, fa_cpu_kernels()->naive_forward[args->dtype], fa_cpu_kernels()->naive_backward[args->forward.dtype])
CPU_KERNEL(reference, &fa_reference_forward, &fa_reference_backward)

#define CPU_KVCACHE(NAME, KVCACHE)                                                                                     \
    static size_t NAME##_kvcache_bytes(const fa_kvcache_args *args) { return (KVCACHE)->workspace_bytes(args); }       \
    static fa_status NAME##_kvcache(const fa_kvcache_args *args) {                                                     \
        (KVCACHE)->run(args);                                                                                          \
        return FA_OK;                                                                                                  \
    }
// A bfloat16 product would lose float8's smallest numbers, which are denormal there: those caches are widened to float32.
static const fa_cpu_kvcache *fused_kvcache_of(const fa_kvcache_args *args) {
    return fa_cpu_kernels()->kvcache[args->cache_dtype == FA_FLOAT8_E4M3 ? FA_FLOAT32 : args->dtype];
}
CPU_KVCACHE(fused, fused_kvcache_of(args))
CPU_KVCACHE(reference, &fa_reference_kvcache)

#define CPU_ROW(IMPL, NAME, KVCACHE_BYTES, KVCACHE)                                                                    \
    {{IMPL, FA_CPU, #NAME}, NULL, NAME##_forward_bytes, NAME##_forward, NAME##_backward_bytes,                         \
     NAME##_backward,       NULL, KVCACHE_BYTES,        KVCACHE}
static const fa_kernel kRows[] = {
    CPU_ROW(FA_FUSED, fused, fused_kvcache_bytes, fused_kvcache),                 // tiles and an online softmax
    CPU_ROW(FA_NAIVE, naive, NULL, NULL),                                         // the score matrix in memory
    CPU_ROW(FA_REFERENCE, reference, reference_kvcache_bytes, reference_kvcache), // scalar float64
};
const fa_kernel_rows fa_cpu_kernel_rows = {kRows, sizeof kRows / sizeof kRows[0]};
