// out[u][r] = rows[r][u] for 16 rows of 32-bit elements and units <= 16 columns. rows may be read up to 16 columns.
// Pairs, quads and then 128-bit quarters change places: 4 x 16 shuffles for 256 elements.
static inline void v_transpose(void *out, int64_t out_stride, const void *rows, int64_t row_stride, int64_t units) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512((const uint32_t *)rows + r * row_stride);
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4)
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            a[r + 2 * k] = _mm512_unpacklo_epi64(b[r + k], b[r + k + 2]); // column 2k of each quarter, rows r ... r + 3
            a[r + 2 * k + 1] = _mm512_unpackhi_epi64(b[r + k], b[r + k + 2]);
        }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i low02 = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88),
                      low13 = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xDD);
        const __m512i high02 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
        const __m512i high13 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xDD);
        b[c] = _mm512_shuffle_i32x4(low02, high02, 0x88);
        b[c + 4] = _mm512_shuffle_i32x4(low13, high13, 0x88);
        b[c + 8] = _mm512_shuffle_i32x4(low02, high02, 0xDD);
        b[c + 12] = _mm512_shuffle_i32x4(low13, high13, 0xDD);
    }
#pragma GCC unroll 16
    for (int u = 0; u < 16; ++u)
        if (u < units) _mm512_storeu_si512((uint32_t *)out + u * out_stride, b[u]);
}
