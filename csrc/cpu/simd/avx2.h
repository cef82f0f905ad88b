// The vector names of the CPU kernels in AVX2 + FMA + F16C: 8 float32 or 4 float64 lanes.
#ifndef FA_SIMD_H
#define FA_SIMD_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

// Micro-kernel 6 x 2 vectors: 12 accumulators + 2 of B + 1 of A of the 16 registers (98 % of the FMA peak on Zen 4).
#define FA_MICRO_ROWS 6
enum { kMicroRows = FA_MICRO_ROWS, kMicroVectors = 2, kStreamVectors = 8 };

#if FA_REAL_IS_DOUBLE

typedef double real;
typedef __m256d vreal;
enum { kLanes = 4 };

static inline vreal v_load(const real *p) { return _mm256_loadu_pd(p); }
static inline void v_store(real *p, vreal x) { _mm256_storeu_pd(p, x); }
static inline vreal v_set1(real x) { return _mm256_set1_pd(x); }
static inline vreal v_add(vreal a, vreal b) { return _mm256_add_pd(a, b); }
static inline vreal v_sub(vreal a, vreal b) { return _mm256_sub_pd(a, b); }
static inline vreal v_mul(vreal a, vreal b) { return _mm256_mul_pd(a, b); }
static inline vreal v_div(vreal a, vreal b) { return _mm256_div_pd(a, b); }
static inline vreal v_fma(vreal a, vreal b, vreal c) { return _mm256_fmadd_pd(a, b, c); }
static inline vreal v_max(vreal a, vreal b) { return _mm256_max_pd(a, b); } // b if either is NaN
static inline vreal v_select_below(vreal x, vreal limit, vreal below, vreal other) {
    return _mm256_blendv_pd(other, below, _mm256_cmp_pd(x, limit, _CMP_LT_OQ));
}

static inline real v_hsum(vreal x) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
static inline vreal v_hsums(const vreal *a) { // lane i: the sum of a[i], of kLanes vectors
    const __m256d low = _mm256_hadd_pd(a[0], a[1]), high = _mm256_hadd_pd(a[2], a[3]);
    return _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20), _mm256_permute2f128_pd(low, high, 0x31));
}
static inline real v_hmax(vreal x) {
    const __m128d half = _mm_max_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_max_sd(half, _mm_unpackhi_pd(half, half)));
}

#include "cpu/simd/exp2_f64.h"

static inline vreal v_exp2(vreal x) {                                // x < 1023.5
    const vreal clamped = _mm256_max_pd(_mm256_set1_pd(-1022.0), x); // NaN passes
    const vreal whole = _mm256_round_pd(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vreal mantissa = exp2_fraction(_mm256_sub_pd(clamped, whole));
    const vreal magic = _mm256_set1_pd(6755399441055744.0); // 1.5 * 2^52: the integer lands in the low mantissa bits
    const __m256i exponent = _mm256_slli_epi64(_mm256_castpd_si256(_mm256_add_pd(whole, magic)), 52);
    const vreal y = _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(mantissa), exponent));
    return _mm256_andnot_pd(_mm256_cmp_pd(x, _mm256_set1_pd(-1022.0), _CMP_LT_OQ), y); // below: 0
}

#else

typedef float real;
typedef __m256 vreal;
enum { kLanes = 8 };

static inline vreal v_load(const real *p) { return _mm256_loadu_ps(p); }
static inline void v_store(real *p, vreal x) { _mm256_storeu_ps(p, x); }
static inline vreal v_set1(real x) { return _mm256_set1_ps(x); }
static inline vreal v_add(vreal a, vreal b) { return _mm256_add_ps(a, b); }
static inline vreal v_sub(vreal a, vreal b) { return _mm256_sub_ps(a, b); }
static inline vreal v_mul(vreal a, vreal b) { return _mm256_mul_ps(a, b); }
static inline vreal v_div(vreal a, vreal b) { return _mm256_div_ps(a, b); }
static inline vreal v_fma(vreal a, vreal b, vreal c) { return _mm256_fmadd_ps(a, b, c); }
static inline vreal v_max(vreal a, vreal b) { return _mm256_max_ps(a, b); } // b if either is NaN
static inline vreal v_select_below(vreal x, vreal limit, vreal below, vreal other) {
    return _mm256_blendv_ps(other, below, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
}

static inline real v_hsum(vreal x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
static inline vreal v_hsums(const vreal *a) { // lane i: the sum of a[i], of kLanes vectors
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
static inline real v_hmax(vreal x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

#include "cpu/simd/exp2_f32.h"

static inline vreal v_exp2(vreal x) {                                // x < 127.5
    const vreal clamped = _mm256_max_ps(_mm256_set1_ps(-126.0f), x); // NaN passes
    const vreal whole = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vreal mantissa = exp2_fraction(_mm256_sub_ps(clamped, whole));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    const vreal y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(mantissa), exponent));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_LT_OQ), y); // below: 0
}

static inline vreal v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void v_store_f16(uint16_t *p, vreal x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vreal v_load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
// 2^-8 of each value: the float16 whose exponent has the same bits.
static inline vreal v_load_e4m3(const uint8_t *p) {
    const __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p)), 7);
    const __m128i magnitude = _mm_and_si128(words, _mm_set1_epi16(0x3F80));
    const __m128i nan = _mm_srli_epi16(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x3F80)), 1);
    return _mm256_cvtph_ps(_mm_or_si128(_mm_and_si128(words, _mm_set1_epi16((short)0xBF80)), nan));
}
static inline void v_store_bf16(uint16_t *p, vreal x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}

#endif

// dst, a vector: `bytes` of src, less than a vector, then zeros.
static inline void v_copy_first(void *dst, const void *src, int64_t bytes) {
    _mm256_storeu_si256((__m256i *)dst, _mm256_setzero_si256());
    memcpy(dst, src, (size_t)bytes);
}

#include "cpu/simd/operand_real.h"
#include "cpu/simd/transpose_scalar.h"

#endif
