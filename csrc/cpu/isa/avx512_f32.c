// The CPU kernels: avx512, float32 arithmetic, for float32, float16 and bfloat16.
#define FA_REAL_IS_DOUBLE 0
#include "cpu/simd/avx512.h"

#include "cpu/kernels/kernels.h"

FA_CPU_FUSED_INSTANCE(avx512_f32)
FA_CPU_NAIVE_INSTANCE(avx512_f32)
