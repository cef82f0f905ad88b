// The vector names of the CPU kernels, one lane wide: what a machine without AVX2 runs, and what the others are tested
// against. FA_REAL_IS_DOUBLE chooses float64 arithmetic.
#ifndef FA_SIMD_H
#define FA_SIMD_H

#include <math.h>
#include <stdint.h>

#include "cpu/convert.h"

#if FA_REAL_IS_DOUBLE
typedef double real;
#else
typedef float real;
#endif
typedef real vreal;

// Micro-kernel: kMicroRows x kMicroCols accumulators; 4 x 4 keeps them in the 16 registers of a plain FPU.
#define FA_MICRO_ROWS 4
enum { kLanes = 1, kMicroRows = FA_MICRO_ROWS, kMicroVectors = 4, kStreamVectors = 8 };

static inline vreal v_load(const real *p) { return *p; }
static inline void v_store(real *p, vreal x) { *p = x; }
static inline vreal v_set1(real x) { return x; }
static inline vreal v_add(vreal a, vreal b) { return a + b; }
static inline vreal v_sub(vreal a, vreal b) { return a - b; }
static inline vreal v_mul(vreal a, vreal b) { return a * b; }
static inline vreal v_div(vreal a, vreal b) { return a / b; }
static inline vreal v_fma(vreal a, vreal b, vreal c) { return a * b + c; }
static inline vreal v_max(vreal a, vreal b) { return a > b ? a : b; } // b if either is NaN
static inline vreal v_select_below(vreal x, vreal limit, vreal below, vreal other) { return x < limit ? below : other; }
static inline real v_hmax(vreal a) { return a; }
static inline real v_hsum(vreal a) { return a; }
static inline vreal v_hsums(const vreal *a) { return a[0]; } // lane i: the sum of a[i], of kLanes vectors

#if FA_REAL_IS_DOUBLE
static inline vreal v_exp2(vreal x) { return exp2(x); }
#else
static inline vreal v_exp2(vreal x) { return exp2f(x); }
static inline vreal v_load_f16(const uint16_t *p) { return fa_f16_to_f32(*p); }
static inline vreal v_load_bf16(const uint16_t *p) { return fa_bf16_to_f32(*p); }
static inline vreal v_load_e4m3(const uint8_t *p) { return fa_e4m3_to_f32(*p) * 0x1p-8F; } // as the float16 of its bits
static inline void v_store_f16(uint16_t *p, vreal x) { *p = fa_f32_to_f16(x); }
static inline void v_store_bf16(uint16_t *p, vreal x) { *p = fa_f32_to_bf16(x); }
#endif

static inline void v_copy_first(void *dst, const void *src, int64_t bytes) { memcpy(dst, src, (size_t)bytes); }

#include "cpu/simd/operand_real.h"
#include "cpu/simd/transpose_scalar.h"

#endif
