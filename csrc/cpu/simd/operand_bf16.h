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
static inline void v_store_operand(operand *p, const real *x) { v_store_along(p, v_load(x), v_load(x + kLanes)); }
// kLanes columns of two neighbouring rows, as operands down the columns.
static inline void v_store_down(operand *p, vreal row0, vreal row1) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(row0));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(row1));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// 2 * kLanes columns of two neighbouring rows, as operands down the columns: out[0] and out[1] hold every other four of them.
static inline void v_load_down(voperand out[2], const void *row0, const void *row1) {
    const __m512i a = _mm512_loadu_si512(row0), b = _mm512_loadu_si512(row1);
    out[0] = (voperand)_mm512_unpacklo_epi16(a, b);
    out[1] = (voperand)_mm512_unpackhi_epi16(a, b);
}
// p[0 ... 2 * kLanes): what was summed over v_load_down's operands, put in the order of the columns.
static inline void v_order_columns(real *p) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + kLanes);
    _mm512_storeu_ps(p, _mm512_permutex2var_ps(a, low, b));
    _mm512_storeu_ps(p + kLanes, _mm512_permutex2var_ps(a, high, b));
}
