// out[u][r] = rows[r][u] for kLanes rows and units <= kLanes columns.
static inline void v_transpose(operand *out, int64_t out_stride, const operand *rows, int64_t row_stride,
                               int64_t units) {
    for (int64_t u = 0; u < units; ++u)
        for (int64_t r = 0; r < kLanes; ++r) out[u * out_stride + r] = rows[r * row_stride + u];
}
