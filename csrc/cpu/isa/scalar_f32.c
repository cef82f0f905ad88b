// The CPU kernels: scalar, float32 arithmetic, for float32, float16 and bfloat16.
#define FA_REAL_IS_DOUBLE 0
#include "cpu/simd/scalar.h"

#include "cpu/kernels/kernels.h"

FA_CPU_FUSED_INSTANCE(scalar_f32)
FA_CPU_NAIVE_INSTANCE(scalar_f32)
