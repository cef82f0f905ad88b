// Special functions and logical operations of the hardware.
#ifndef FA_PTX_MATH_CUH
#define FA_PTX_MATH_CUH

#include <cstdint>

// 2^x within 2 units in the last place; subnormal results are 0, 2^-inf = 0.
__device__ __forceinline__ float ex2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh x within 2^-11 of itself.
__device__ __forceinline__ float tanh_approx(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// (x | set) & keep in one instruction, which the compiler finds only where one of them is no constant.
__device__ __forceinline__ uint32_t or_and(uint32_t x, uint32_t set, uint32_t keep) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xA8;" : "=r"(y) : "r"(x), "r"(set), "r"(keep));
    return y;
}

#endif
