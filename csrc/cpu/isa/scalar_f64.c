// The CPU kernels: scalar, float64 arithmetic.
#define FA_REAL_IS_DOUBLE 1
#include "cpu/simd/scalar.h"

#include "cpu/kernels/kernels.h"

FA_CPU_FUSED_INSTANCE(scalar_f64)
FA_CPU_NAIVE_INSTANCE(scalar_f64)
