// The fused CPU kernels: AVX-512, bfloat16 products with float32 arithmetic.
#define FA_REAL_IS_DOUBLE 0
#define FA_BF16_OPERANDS 1
#include "cpu/simd/avx512.h"

#include "cpu/kernels/kernels.h"

FA_CPU_FUSED_INSTANCE(avx512bf16_bf16)
