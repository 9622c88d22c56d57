/* exp of eight floats, the same bits on every instruction set.
 *
 * x = n ln 2 + r with |r| <= ln 2 / 2; exp(x) = 2^n exp(r). ln 2 is subtracted in two parts, the first of which has so
 * few bits that n times it is exact; exp(r) is its Taylor polynomial of degree 7, whose remainder is below 2^-27. */

#ifndef EXPERTD_EXPONENTIAL_H
#define EXPERTD_EXPONENTIAL_H

#include "vectors.h"

INLINE f32x8 exponential(f32x8 x) {
    /* Beyond these the result is 0 or infinity; NaN stays what it is, as no comparison with it is true. */
    u32x8 is_low = (u32x8)(x < -104.0f), is_high = (u32x8)(x > 89.0f), is_nan = (u32x8)(x != x);
    f32x8 clamped = (f32x8)((u32x8)x & ~(is_low | is_high | is_nan));
    f32x8 shifted = clamped * 0x1.715476p0f + 0x1.8p23f; /* log2 e; then the nearest integer in the low bits */
    f32x8 n = shifted - 0x1.8p23f;
    f32x8 r = (clamped - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    f32x8 p = 0x1.a01a02p-13f * r + 0x1.6c16c2p-10f;
    p = p * r + 0x1.111112p-7f;
    p = p * r + 0x1.555556p-5f;
    p = p * r + 0x1.555556p-3f;
    p = p * r + 0.5f;
    p = (p * r) * r + r;
    /* 2^n in two factors, since n reaches -150 and a float's exponent ends at -126. */
    i32x8 exponent = (i32x8)shifted - (int32_t)0x4b400000;
    i32x8 half = exponent >> 1;
    f32x8 factor = (f32x8)((half + 127) << 23), other = (f32x8)((exponent - half + 127) << 23);
    f32x8 value = ((p + 1.0f) * factor) * other;
    u32x8 infinity = (u32x8)((f32x8){0} + __builtin_inff());
    return (f32x8)(((u32x8)value & ~(is_low | is_high | is_nan)) | (infinity & is_high) | ((u32x8)x & is_nan));
}

#endif
