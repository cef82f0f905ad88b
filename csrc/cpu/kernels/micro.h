// The one matrix product of the CPU kernels: C[rows][kMicroCols] (+)= A[rows][depth] * B[depth][kMicroCols].
//
//              B: one row of kMicroVectors vectors a step       A is read one element at a time and broadcast, so it
//              +--------+--------+                              may lie in memory any way: operand (r, k) at
//   A  a_r ->  | acc_r0 | acc_r1 |   kMicroRows rows of         a[r * a_row + k * a_depth]. B and C rows are b_row and
//              +--------+--------+   accumulators               c_row apart. No operand needs alignment.
#ifndef FA_MICRO_H
#define FA_MICRO_H

enum { kMicroCols = kMicroVectors * kLanes };

// Operands that `n` steps of a contraction take: the SIMD header puts kDepth of them into one (two bfloat16, or one real).
static inline int64_t depth_units(int64_t n) { return (n + kDepth - 1) / kDepth; }

static inline __attribute__((always_inline)) void micro_rows(const int rows, int64_t units, const operand *a,
                                                             int64_t a_row, int64_t a_depth, const operand *b,
                                                             int64_t b_row, real *c, int64_t c_row,
                                                             const int accumulate) {
    vreal acc[kMicroRows][kMicroVectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < kMicroVectors; ++n) acc[r][n] = accumulate ? v_load(c + r * c_row + n * kLanes) : v_set1(0);
    for (int64_t k = 0; k < units; ++k) {
        voperand b_k[kMicroVectors];
#pragma GCC unroll 4
        for (int n = 0; n < kMicroVectors; ++n) b_k[n] = v_load_operand(b + n * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const voperand a_rk = v_set1_operand(a[r * a_row]);
#pragma GCC unroll 4
            for (int n = 0; n < kMicroVectors; ++n) acc[r][n] = v_dot(a_rk, b_k[n], acc[r][n]);
        }
        a += a_depth;
        b += b_row;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < kMicroVectors; ++n) v_store(c + r * c_row + n * kLanes, acc[r][n]);
}

// rows in [1, kMicroRows]: one specialisation each, so that the accumulators stay in registers.
static void micro_kernel(int64_t rows, int64_t units, const operand *a, int64_t a_row, int64_t a_depth,
                         const operand *b, int64_t b_row, real *c, int64_t c_row, int accumulate) {
#define FA_MICRO_CASE(R)                                                                                               \
    case R:                                                                                                            \
        if (accumulate)                                                                                                \
            micro_rows(R, units, a, a_row, a_depth, b, b_row, c, c_row, 1);                                            \
        else                                                                                                           \
            micro_rows(R, units, a, a_row, a_depth, b, b_row, c, c_row, 0);                                            \
        break;
    switch (rows) {
        FA_MICRO_CASE(1)
        FA_MICRO_CASE(2)
        FA_MICRO_CASE(3)
        FA_MICRO_CASE(4)
#if FA_MICRO_ROWS > 4
        FA_MICRO_CASE(5)
        FA_MICRO_CASE(6)
#endif
#if FA_MICRO_ROWS > 6
        FA_MICRO_CASE(7)
        FA_MICRO_CASE(8)
#endif
    }
#undef FA_MICRO_CASE
}

#endif
