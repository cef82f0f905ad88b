// Special functions, logical operations and special registers of the hardware.
#ifndef FA_PTX_MATH_CUH
#define FA_PTX_MATH_CUH

#include <cstdint>

// 2^x within 2 units in the last place; subnormal results are 0, 2^-inf = 0.
__device__ __forceinline__ float ex2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x within 1 unit in the last place; 1 / inf = 0.
__device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Each half: 16 times its highest bit.
__device__ __forceinline__ uint32_t sign_halves(uint32_t x) {
    uint32_t mask;
    asm("prmt.b32 %0, %1, %1, 0xBB99;" : "=r"(mask) : "r"(x)); // 8 + n: the sign of byte n, 8 times
    return mask;
}

// threadIdx.x, read once more: nothing that was made of the first reading stays in registers for this one's sake.
__device__ __forceinline__ int thread_index_again() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

// x, which stays in its register: what it was made of is not made again.
__device__ __forceinline__ void keep(int &x) { asm volatile("" : "+r"(x)); }

#endif
