// Division by a number that the host knows: on the device a multiplication and a shift, where a division takes twenty
// instructions (Granlund and Montgomery, Division by invariant integers using multiplication, 1994).
#ifndef FA_DIVISOR_CUH
#define FA_DIVISOR_CUH

#include <cstdint>

#include "host_device.h"

struct Divisor { // of numerators from 0 to 2^31 - 1
    uint32_t value, multiplier, shift;

    constexpr explicit Divisor(uint32_t value_) : value(value_), multiplier(0), shift(0) {
        if (value < 2) return;
        while (shift < 31 && value - 1 >> (shift + 1)) ++shift; // 2^shift < value <= 2^(shift + 1)
        multiplier = static_cast<uint32_t>(((uint64_t(1) << (32 + shift)) + value - 1) / value);
    }
    FA_HOST_DEVICE constexpr int quotient(int n) const {
        return value == 1
                   ? n
                   : static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> 32 >> shift);
    }
};

static_assert(Divisor(1).quotient(5) == 5 && Divisor(2).quotient(5) == 2 &&
              Divisor(3).quotient(INT32_MAX) == 715827882);
static_assert(Divisor(7).quotient(6) == 0 && Divisor(7).quotient(7) == 1 && Divisor(641).quotient(640) == 0);
static_assert(Divisor(65537).quotient(INT32_MAX) == 32767 && Divisor(65537).quotient(65537 * 32767 - 1) == 32766);
static_assert(Divisor(INT32_MAX).quotient(INT32_MAX) == 1 && Divisor(INT32_MAX).quotient(INT32_MAX - 1) == 0);
static_assert(Divisor(0xFFFFFFFF).quotient(INT32_MAX) == 0 && Divisor(0x80000001).quotient(INT32_MAX) == 0);
static_assert(Divisor(1 << 30).quotient(INT32_MAX) == 1 && Divisor((1 << 30) + 1).quotient(1 << 30) == 0);

#endif
