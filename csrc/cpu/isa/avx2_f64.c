// The CPU kernels: avx2, float64 arithmetic.
#define FA_REAL_IS_DOUBLE 1
#include "cpu/simd/avx2.h"

#include "cpu/kernels/kernels.h"

FA_CPU_FUSED_INSTANCE(avx2_f64)
FA_CPU_NAIVE_INSTANCE(avx2_f64)
