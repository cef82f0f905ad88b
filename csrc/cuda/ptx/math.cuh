// Special functions of the hardware.
#ifndef FA_PTX_MATH_CUH
#define FA_PTX_MATH_CUH

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

#endif
