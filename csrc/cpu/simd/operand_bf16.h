// What the micro-kernel multiplies: pairs of bfloat16, two steps of a contraction each (vdpbf16ps has twice the rate of an
// FMA). Products are exact and accumulate in float32; denormals count as zero.
typedef uint32_t operand; // the earlier step in the low half
typedef __m512bh voperand;
enum { kDepth = 2 };

static inline voperand v_load_operand(const operand *p) { return (voperand)_mm512_loadu_si512(p); }
static inline voperand v_set1_operand(operand x) { return (voperand)_mm512_set1_epi32((int)x); }
static inline vreal v_dot(voperand a, voperand b, vreal c) { return _mm512_dpbf16_ps(c, a, b); }

// 2 * kLanes neighbours of a row, as operands along it.
static inline void v_store_along(operand *p, vreal x0, vreal x1) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(x1, x0));
}
// kLanes columns of two neighbouring rows, as operands down the columns.
static inline void v_store_down(operand *p, vreal row0, vreal row1) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(row0));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(row1));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
