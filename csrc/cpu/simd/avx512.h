// The vector names of the CPU kernels in AVX-512 F/BW/DQ/VL: 16 float32 or 8 float64 lanes.
#ifndef FA_SIMD_H
#define FA_SIMD_H

#include <immintrin.h>
#include <stdint.h>

// Micro-kernel 8 x 2 vectors: 16 accumulators + 2 of B + 1 of A of the 32 registers. 8 rows keep the border of a causal
// tile fine, and two FMA ports with four cycles of latency need no more than 8 accumulators in flight.
#define FA_MICRO_ROWS 8
enum { kMicroRows = FA_MICRO_ROWS, kMicroVectors = 2, kStreamVectors = 16 };

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
static inline vreal v_hsums(const vreal *a) { // lane i: the sum of a[i], of kLanes vectors
    __m512d b[4], c[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        b[i] = _mm512_add_pd(_mm512_unpacklo_pd(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_pd(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        c[i] = _mm512_add_pd(_mm512_shuffle_f64x2(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f64x2(b[2 * i], b[2 * i + 1], 0xDD));
    return _mm512_add_pd(_mm512_shuffle_f64x2(c[0], c[1], 0x88), _mm512_shuffle_f64x2(c[0], c[1], 0xDD));
}

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
static inline __m512 add_unpacked(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
static inline __m512 add_quarters(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
static inline vreal v_hsums(const vreal *a) { // lane i: the sum of a[i], of kLanes vectors
    __m512 quads[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d low = _mm512_castps_pd(add_unpacked(a[4 * i], a[4 * i + 1]));
        const __m512d high = _mm512_castps_pd(add_unpacked(a[4 * i + 2], a[4 * i + 3]));
        quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    return add_quarters(add_quarters(quads[0], quads[1]), add_quarters(quads[2], quads[3]));
}

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
// 2^-8 of each value: the float16 whose exponent has the same bits.
static inline vreal v_load_e4m3(const uint8_t *p) {
    const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
    const __m256i halves = _mm256_and_si256(words, _mm256_set1_epi16((short)0xBF80));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(words, _mm256_set1_epi16(0x3F80)), // S.1111.111
                                                  _mm256_set1_epi16(0x3F80));
    return _mm512_cvtph_ps(_mm256_mask_mov_epi16(halves, nan, _mm256_set1_epi16(0x7E00)));
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

// dst, a vector: `bytes` of src, less than a vector, then zeros.
static inline void v_copy_first(void *dst, const void *src, int64_t bytes) {
    _mm512_storeu_si512(dst, _mm512_maskz_loadu_epi8(((__mmask64)1 << bytes) - 1, src));
}

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
