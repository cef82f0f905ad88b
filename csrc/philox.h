// Dropout bits: Philox4x32-7 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11, table 2),
// 16 bits an entry, so that they depend on nothing but (seed, offset, head, i, j).
//
// One call of 128 bits serves the group of eight entries that one thread holds in a 16 x 16 tile of tensor-core scores:
//   rows {g, g + 8} x columns {2t, 2t + 1, 2t + 8, 2t + 9} of the tile, g = i mod 8, t = (j mod 8) / 2
//   counter = (8 * (i / 16) + g,  4 * (j / 16) + t,  b * heads_q + h,  offset)       key = seed, low word first
//   entry (i, j) is 16-bit field 4 * (j / 8 mod 2) + 2 * (i / 8 mod 2) + j mod 2 of the output, low half of word 0 first
// An entry is kept iff its 16 bits >= round(65536 * dropout_p).
#ifndef FA_PHILOX_H
#define FA_PHILOX_H

#include <stdint.h>

#include "host_device.h"

enum { kPhiloxRounds = 7 };

static FA_HOST_DEVICE void fa_philox_round(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    const uint64_t product0 = (uint64_t)0xD2511F53u * counter[0];
    const uint64_t product1 = (uint64_t)0xCD9E8D57u * counter[2];
    counter[0] = (uint32_t)(product1 >> 32) ^ counter[1] ^ key0;
    counter[1] = (uint32_t)product1;
    counter[2] = (uint32_t)(product0 >> 32) ^ counter[3] ^ key1;
    counter[3] = (uint32_t)product0;
}

static FA_HOST_DEVICE void fa_philox_next_key(uint32_t *key0, uint32_t *key1) {
    *key0 += 0x9E3779B9u; // golden ratio
    *key1 += 0xBB67AE85u; // sqrt(3) - 1
}

static FA_HOST_DEVICE void fa_philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        fa_philox_round(counter, key0, key1);
        fa_philox_next_key(&key0, &key1);
    }
}

static FA_HOST_DEVICE uint32_t fa_dropout_threshold(double dropout_p) { return (uint32_t)(dropout_p * 65536.0 + 0.5); }

// The counter words of the group that holds (row, col).
static FA_HOST_DEVICE uint32_t fa_dropout_row_word(int64_t row) { return (uint32_t)((row >> 4) * 8 + (row & 7)); }
static FA_HOST_DEVICE uint32_t fa_dropout_col_word(int64_t col) {
    return (uint32_t)((col >> 4) * 4 + ((col & 7) >> 1));
}

// Whether (row, col) of head `head` = b * heads_q + h is kept: the definition, one entry at a time.
static FA_HOST_DEVICE int fa_dropout_keeps(uint64_t seed, uint32_t offset, uint32_t head, int64_t row, int64_t col,
                                           uint32_t threshold) {
    uint32_t words[4] = {fa_dropout_row_word(row), fa_dropout_col_word(col), head, offset};
    fa_philox(words, (uint32_t)seed, (uint32_t)(seed >> 32));
    const uint32_t low = (row >> 3) & 1 ? words[1] : words[0], high = (row >> 3) & 1 ? words[3] : words[2];
    const uint32_t word = (col >> 3) & 1 ? high : low; // no index at run time: the words stay in registers
    return (col & 1 ? word >> 16 : word & 0xFFFFu) >= threshold;
}

#endif
