// The vector names of the CPU kernels in AVX-512 F/BW/DQ/VL: 16 float32 or 8 float64 lanes.
#ifndef FA_SIMD_H
#define FA_SIMD_H

#include <immintrin.h>
#include <stdint.h>

// Micro-kernel 8 x 2 vectors: 16 accumulators + 2 of B + 1 of A of the 32 registers. 8 rows keep the border of a causal
// tile fine, and two FMA ports with four cycles of latency need no more than 8 accumulators in flight.
#define FA_MICRO_ROWS 8
enum { kMicroRows = FA_MICRO_ROWS, kMicroVectors = 2 };

#if FA_REAL_IS_DOUBLE

typedef double real;
typedef __m512d vreal;
enum { kLanes = 8 };

static inline vreal v_load(const real *p) { return _mm512_loadu_pd(p); }
static inline void v_store(real *p, vreal x) { _mm512_storeu_pd(p, x); }
static inline vreal v_set1(real x) { return _mm512_set1_pd(x); }
static inline vreal v_add(vreal a, vreal b) { return _mm512_add_pd(a, b); }
static inline vreal v_sub(vreal a, vreal b) { return _mm512_sub_pd(a, b); }
static inline vreal v_mul(vreal a, vreal b) { return _mm512_mul_pd(a, b); }
static inline vreal v_div(vreal a, vreal b) { return _mm512_div_pd(a, b); }
static inline vreal v_fma(vreal a, vreal b, vreal c) { return _mm512_fmadd_pd(a, b, c); }
static inline vreal v_max(vreal a, vreal b) { return _mm512_max_pd(a, b); } // b if either is NaN
static inline vreal v_select_below(vreal x, vreal limit, vreal below, vreal other) {
    return _mm512_mask_mov_pd(other, _mm512_cmp_pd_mask(x, limit, _CMP_LT_OQ), below);
}
static inline real v_hsum(vreal x) { return _mm512_reduce_add_pd(x); }
static inline real v_hmax(vreal x) { return _mm512_reduce_max_pd(x); }

#include "cpu/simd/exp2_f64.h"

static inline vreal v_exp2(vreal x) { // vscalef gives 0 for a whole part of -inf, whatever the fraction
    const vreal whole = _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_pd(exp2_fraction(_mm512_sub_pd(x, whole)), whole);
}

#else

typedef float real;
typedef __m512 vreal;
enum { kLanes = 16 };

static inline vreal v_load(const real *p) { return _mm512_loadu_ps(p); }
static inline void v_store(real *p, vreal x) { _mm512_storeu_ps(p, x); }
static inline vreal v_set1(real x) { return _mm512_set1_ps(x); }
static inline vreal v_add(vreal a, vreal b) { return _mm512_add_ps(a, b); }
static inline vreal v_sub(vreal a, vreal b) { return _mm512_sub_ps(a, b); }
static inline vreal v_mul(vreal a, vreal b) { return _mm512_mul_ps(a, b); }
static inline vreal v_div(vreal a, vreal b) { return _mm512_div_ps(a, b); }
static inline vreal v_fma(vreal a, vreal b, vreal c) { return _mm512_fmadd_ps(a, b, c); }
static inline vreal v_max(vreal a, vreal b) { return _mm512_max_ps(a, b); } // b if either is NaN
static inline vreal v_select_below(vreal x, vreal limit, vreal below, vreal other) {
    return _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), below);
}
static inline real v_hsum(vreal x) { return _mm512_reduce_add_ps(x); }
static inline real v_hmax(vreal x) { return _mm512_reduce_max_ps(x); }

#include "cpu/simd/exp2_f32.h"

static inline vreal v_exp2(vreal x) { // vscalef gives 0 for a whole part of -inf, whatever the fraction
    const vreal whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(exp2_fraction(_mm512_sub_ps(x, whole)), whole);
}

static inline vreal v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void v_store_f16(uint16_t *p, vreal x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vreal v_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void v_store_bf16(uint16_t *p, vreal x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(high));
}

#endif

#if FA_BF16_OPERANDS
#include "cpu/simd/operand_bf16.h"
#else
#include "cpu/simd/operand_real.h"
#endif
#if FA_REAL_IS_DOUBLE
#include "cpu/simd/transpose_scalar.h"
#else
#include "cpu/simd/transpose_avx512.h"
#endif

#endif
