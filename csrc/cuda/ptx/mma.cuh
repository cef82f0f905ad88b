// D += A B on the tensor cores, by one warp (PTX ISA, "mma"). Lane = 4 g + t:
//
//   acc  16 x 8         c[0..1] = row g, columns 2t, 2t + 1;   c[2..3] = row g + 8
//   A    16 x 16, 16 bit   a[0], a[1] = rows g, g + 8, columns 2t, 2t + 1;   a[2], a[3] = columns 2t + 8, 2t + 9
//   B    16 x 8,  16 bit   b[0] = rows 2t, 2t + 1 of column g;   b[1] = rows 2t + 8, 2t + 9
//   A    16 x 8,  tf32     a[0], a[1] = rows g, g + 8 of column t;   a[2], a[3] = column t + 4
//   B    8 x 8,   tf32     b[0] = row t of column g;   b[1] = row t + 4
#ifndef FA_PTX_MMA_CUH
#define FA_PTX_MMA_CUH

#include <cstdint>

__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The low 13 bits of a tf32 operand are not read.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An 8 x 8 matrix of 16-bit elements, of which a lane has columns 2t, 2t + 1 of row g: transposed (PTX ISA, "movmatrix").
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

#endif
