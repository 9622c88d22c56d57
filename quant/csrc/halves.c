#include "halves.h"

#include <stdbool.h>

#include "half.h"
#include "panels.h"

#ifdef EXPERTD_HAS_AVX2
#include <immintrin.h>
#define F16C __attribute__((target("avx2,f16c")))
#endif

/* The portable form of fp16, for eight floats; see fp16_to_f32 for the way back. A normal number's mantissa is rounded
 * by adding half a unit, less a bit if it is even; a carry moves into the exponent as it should. To a magnitude below
 * 2^-14 a half is added, whose last bit is worth 2^-24 as a subnormal's is: the addition does the rounding. */
INLINE u16x8 halves_of(f32x8 x) {
    u32x8 bits = (u32x8)x;
    u32x8 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    u32x8 normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - ((127 - 15) << 23)) >> 13;
    u32x8 subnormal = (u32x8)((f32x8)magnitude + 0.5f) - 0x3f000000;
    u32x8 nan = (magnitude >> 13 & 0x3ff) | 0x7e00;
    /* Below 2^31 all, so comparing as signed is the same, and one instruction. */
    u32x8 is_subnormal = (u32x8)((i32x8)magnitude < 0x38800000);
    u32x8 is_infinite = (u32x8)((i32x8)magnitude >= 0x477ff000);
    u32x8 is_nan = (u32x8)((i32x8)magnitude > 0x7f800000);
    u32x8 value = (normal & ~(is_subnormal | is_infinite)) | (subnormal & is_subnormal) |
                  (is_infinite & ~is_nan & 0x7c00) | (nan & is_nan);
    return __builtin_convertvector(value | sign, u16x8);
}

DISPATCHED static void to_floats_portably(const uint16_t *halves, int64_t n, float *floats) {
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t n_left = n - i < LANES ? n - i : LANES;
        f32x8 v = load_half((const uint8_t *)(halves + i), n_left, 0);
        memcpy(floats + i, &v, (size_t)n_left * sizeof *floats);
    }
}

DISPATCHED static void to_halves_portably(const float *floats, int64_t n, uint16_t *halves) {
    for (int64_t i = 0; i < n; i += LANES) {
        size_t n_left = (size_t)(n - i < LANES ? n - i : LANES);
        f32x8 v = {0};
        memcpy(&v, floats + i, n_left * sizeof *floats);
        u16x8 converted = halves_of(v);
        memcpy(halves + i, &converted, n_left * sizeof *halves);
    }
}

#ifdef EXPERTD_HAS_AVX2
F16C static int64_t to_floats_by_eight(const uint16_t *halves, int64_t n, float *floats) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
    }
    return i;
}

F16C static int64_t to_halves_by_eight(const float *floats, int64_t n, uint16_t *halves) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        __m128i converted = _mm256_cvtps_ph(_mm256_loadu_ps(floats + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(halves + i), converted);
    }
    return i;
}
#endif

void halves_to_floats(const uint16_t *halves, int64_t n, float *floats) {
    int64_t n_done = 0;
#ifdef EXPERTD_HAS_AVX2
    if (kernels_in_use()->has_avx2) {
        n_done = to_floats_by_eight(halves, n, floats);
    }
#endif
    to_floats_portably(halves + n_done, n - n_done, floats + n_done);
}

void floats_to_halves(const float *floats, int64_t n, uint16_t *halves) {
    int64_t n_done = 0;
#ifdef EXPERTD_HAS_AVX2
    if (kernels_in_use()->has_avx2) {
        n_done = to_halves_by_eight(floats, n, halves);
    }
#endif
    to_halves_portably(floats + n_done, n - n_done, halves + n_done);
}
