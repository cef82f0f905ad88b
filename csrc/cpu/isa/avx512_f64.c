// The CPU kernels: avx512, float64 arithmetic.
#define FA_REAL_IS_DOUBLE 1
#include "cpu/simd/avx512.h"

#include "cpu/kernels/kernels.h"

FA_CPU_FUSED_INSTANCE(avx512_f64)
FA_CPU_NAIVE_INSTANCE(avx512_f64)
