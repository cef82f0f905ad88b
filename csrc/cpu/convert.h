// One element at a time between memory and arithmetic. 16-bit formats travel as their bits; narrowing rounds to nearest
// even, float64 -> 16 bits by way of float32 (so that scalar and vector code give the same bits).
#ifndef FA_CONVERT_H
#define FA_CONVERT_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "flash_attention.h"
#include "sizes.h"

static inline uint32_t fa_f32_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float fa_f32_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float fa_bf16_to_f32(uint16_t bits) { return fa_f32_from_bits((uint32_t)bits << 16); }
static inline uint16_t fa_f32_to_bf16(float x) {
    const uint32_t bits = fa_f32_bits(x);
    if (x != x) return (uint16_t)((bits | 0x00400000u) >> 16); // stays NaN
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static inline float fa_f16_to_f32(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
    if (magnitude >= 0x7C00u) return fa_f32_from_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13); // inf, NaN
    if (magnitude >= 0x0400u) return fa_f32_from_bits(sign | ((magnitude << 13) + (112u << 23)));       // normal
    const float subnormal = (float)magnitude * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}
static inline uint16_t fa_f32_to_f16(float x) {
    const uint32_t bits = fa_f32_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu)); // NaN
    if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);                               // >= 65520: inf
    if (magnitude < 0x38800000u) // below 2^-14: adding 0.5 rounds at the subnormals' unit, 2^-24
        return (uint16_t)(sign | (fa_f32_bits(fa_f32_from_bits(magnitude) + 0.5f) - 0x3F000000u));
    return (uint16_t)(sign | ((magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
}

// E4M3: sign, four exponent bits (bias 7), three of mantissa; S.1111.111 is NaN and nothing is infinite. Narrowing
// saturates at 448.
static inline float fa_e4m3_to_f32(uint8_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x80u) << 24, magnitude = bits & 0x7Fu;
    if (magnitude == 0x7Fu) return fa_f32_from_bits(sign | 0x7FC00000u);
    const float scaled =
        fa_f32_from_bits(magnitude << 20); // its exponent is read with a bias of 127: 2^-120 of the value
    return fa_f32_from_bits(sign | fa_f32_bits(scaled * 0x1p120f));
}
static inline uint8_t fa_f32_to_e4m3(float x) {
    const uint32_t bits = fa_f32_bits(x), magnitude = bits & 0x7FFFFFFFu;
    const uint8_t sign = (uint8_t)((bits >> 24) & 0x80u);
    if (magnitude > 0x7F800000u) return sign | 0x7Fu;  // NaN
    if (magnitude >= 0x43E80000u) return sign | 0x7Eu; // >= 464, half way to 480: 448
    if (magnitude < 0x3C800000u)                       // below 2^-6: adding 2^14 rounds at the subnormals' unit, 2^-9
        return sign | (uint8_t)(fa_f32_bits(fa_f32_from_bits(magnitude) + 0x1p14f) - 0x46800000u);
    return sign | (uint8_t)((magnitude - (120u << 23) + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20);
}

static inline double fa_load(const void *base, fa_dtype dtype, int64_t index) {
    switch (dtype) {
    case FA_FLOAT32: return ((const float *)base)[index];
    case FA_FLOAT64: return ((const double *)base)[index];
    case FA_FLOAT16: return fa_f16_to_f32(((const uint16_t *)base)[index]);
    case FA_BFLOAT16: return fa_bf16_to_f32(((const uint16_t *)base)[index]);
    case FA_FLOAT8_E4M3: return fa_e4m3_to_f32(((const uint8_t *)base)[index]);
    }
    return NAN;
}

static inline void fa_store(void *base, fa_dtype dtype, int64_t index, double x) {
    switch (dtype) {
    case FA_FLOAT32: ((float *)base)[index] = (float)x; break;
    case FA_FLOAT64: ((double *)base)[index] = x; break;
    case FA_FLOAT16: ((uint16_t *)base)[index] = fa_f32_to_f16((float)x); break;
    case FA_BFLOAT16: ((uint16_t *)base)[index] = fa_f32_to_bf16((float)x); break;
    case FA_FLOAT8_E4M3: ((uint8_t *)base)[index] = fa_f32_to_e4m3((float)x); break;
    }
}

#endif
