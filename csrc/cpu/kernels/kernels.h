// The CPU kernels, instantiated: an instance file includes its SIMD header, then this, then names itself.
#ifndef FA_KERNELS_H
#define FA_KERNELS_H

#include "cpu/kernels/fused_backward.h"
#include "cpu/kernels/fused_forward.h"
#include "cpu/kernels/kvcache.h"

#define FA_CPU_FUSED_INSTANCE(NAME)                                                                                    \
    const fa_cpu_forward fa_##NAME##_fused_forward = {fused_forward_workspace_bytes, fused_forward_run};               \
    const fa_cpu_backward fa_##NAME##_fused_backward = {fused_backward_workspace_bytes, fused_backward_run};           \
    const fa_cpu_kvcache fa_##NAME##_kvcache = {kvcache_workspace_bytes, kvcache_run};

#if !FA_BF16_OPERANDS
#include "cpu/kernels/naive.h"
#define FA_CPU_NAIVE_INSTANCE(NAME)                                                                                    \
    const fa_cpu_forward fa_##NAME##_naive_forward = {naive_forward_workspace_bytes, naive_forward_run};               \
    const fa_cpu_backward fa_##NAME##_naive_backward = {naive_backward_workspace_bytes, naive_backward_run};
#endif

#endif
