// The CPU kernels, instantiated: an instance file includes its SIMD header, then this, then names itself.
#ifndef FA_KERNELS_H
#define FA_KERNELS_H

#include "cpu/kernels/fused_forward.h"

#define FA_CPU_INSTANCE(NAME)                                                                                          \
    const fa_cpu_forward fa_##NAME##_fused_forward = {fused_forward_workspace_bytes, fused_forward_run};

#endif
