// Loads from global memory in the order of the program: the compiler neither gathers them nor their addresses, which would
// fill the registers (PTX ISA, "ld").
#ifndef FA_PTX_GLOBAL_CUH
#define FA_PTX_GLOBAL_CUH

#include <cstdint>

__device__ __forceinline__ uint32_t load_global(const uint32_t *p) {
    uint32_t x;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ uint16_t load_global(const uint16_t *p) {
    uint16_t x;
    asm volatile("ld.global.b16 %0, [%1];" : "=h"(x) : "l"(p) : "memory");
    return x;
}

#endif
