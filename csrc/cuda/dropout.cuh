// Which of a thread's entries dropout takes, one Philox call for each four of them.
#ifndef FA_DROPOUT_CUH
#define FA_DROPOUT_CUH

#include "cuda/tile.cuh"

// Bit kCols * i + j of the result: entry (i, j) of the thread is dropped. Its rows lie 4 apart from `first_row` on, its
// columns 8 apart from `first_col` on, as in tile.cuh, with tiles that start at a multiple of 8 (of 16, where they are as
// high, or as wide); kTransposed: rows of the tile are keys. Rows i and i + 2 and columns j and j + 1 then share a group.
template <int kRows, int kCols, typename Real>
__device__ __forceinline__ uint64_t dropped_entries(const ScoreRule<Real> &rule, int64_t first_row, int64_t first_col) {
    static_assert(kRows * kCols <= 64 && kCols % 2 == 0, "one bit an entry, columns in pairs");
    uint64_t dropped = 0;
    if (rule.dropout_threshold == 0) return dropped;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        if (i & 2) continue;
#pragma unroll
        for (int j = 0; j < kCols; j += 2) {
            const int64_t row = first_row + 4 * i, col = first_col + 8 * j;
            uint32_t words[4] = {fa_dropout_row_word(row), fa_dropout_col_word(col), rule.dropout_head,
                                 rule.dropout_offset};
            fa_philox(words, static_cast<uint32_t>(rule.dropout_seed), static_cast<uint32_t>(rule.dropout_seed >> 32));
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int i_n = i + 2 * (n & 1), j_n = j + (n >> 1);
                if (i_n >= kRows || j_n >= kCols) continue;
                const int64_t query = first_row + 4 * i_n, key = first_col + 8 * j_n;
                const uint32_t low = query & 8 ? words[1] : words[0], high = query & 8 ? words[3] : words[2];
                const uint32_t word = key & 8 ? high : low, bits = key & 1 ? word >> 16 : word & 0xFFFFu;
                dropped |= static_cast<uint64_t>(bits < rule.dropout_threshold) << (kCols * i_n + j_n);
            }
        }
    }
    return dropped;
}

#endif
