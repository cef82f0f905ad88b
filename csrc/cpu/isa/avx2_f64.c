// The CPU kernels: avx2, float64 arithmetic.
#define FA_REAL_IS_DOUBLE 1
#include "cpu/simd/avx2.h"

#include "cpu/kernels/kernels.h"

FA_CPU_INSTANCE(avx2_f64)
