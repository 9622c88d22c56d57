/* 16-bit floats to float32, exactly, infinities and subnormals among them. */

#ifndef EXPERTD_HALF_H
#define EXPERTD_HALF_H

#include "vectors.h"

typedef uint16_t u16x8 __attribute__((vector_size(16)));

INLINE u32x8 load_u16(const uint8_t *at) {
    u16x8 v;
    memcpy(&v, at, sizeof v);
    return __builtin_convertvector(v, u32x8);
}

/* A bf16 is the upper half of a float32. */
INLINE f32x8 bf16_to_f32(u32x8 bits) { return (f32x8)(bits << 16); }

/* Normal numbers: exponent and mantissa move to their places, the exponent's bias grows by 127 - 15; for infinities
 * and NaNs twice that, to reach 255. Subnormals: the mantissa is an integer in units of 2^-24. */
INLINE f32x8 fp16_to_f32(u32x8 bits) {
    u32x8 sign = (bits & 0x8000) << 16;
    u32x8 magnitude = bits & 0x7fff;
    u32x8 normal = (magnitude << 13) + ((127 - 15) << 23);
    u32x8 special = normal + ((127 - 15) << 23);
    u32x8 subnormal = (u32x8)(to_f32(magnitude) * 0x1p-24f);
    u32x8 is_special = (u32x8)(magnitude >= 0x7c00);
    u32x8 is_subnormal = (u32x8)(magnitude < 0x0400);
    u32x8 value = (special & is_special) | (subnormal & is_subnormal) | (normal & ~(is_special | is_subnormal));
    return (f32x8)(value | sign);
}

/* Convert `n` ≤ 8 values; lanes beyond are 0. */
INLINE f32x8 load_half(const uint8_t *at, int64_t n, int is_bf16) {
    uint8_t padded[2 * LANES] = {0};
    if (n < LANES) {
        memcpy(padded, at, (size_t)(2 * n));
        at = padded;
    }
    u32x8 bits = load_u16(at);
    return is_bf16 ? bf16_to_f32(bits) : fp16_to_f32(bits);
}

#endif
