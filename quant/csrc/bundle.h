/* Eight groups of weights, one a lane: what is done along a group is done to whole vectors, in the order of the group,
 * so that results do not depend on the instruction set. */

#ifndef EXPERTD_BUNDLE_H
#define EXPERTD_BUNDLE_H

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "half.h"
#include "solver.h"

typedef f32x8 bundle[EXPERTD_GROUP_SIZE_MAX];

/* Added to a float below 2^22 and taken away again it leaves the nearest integer, ties to even, as torch rounds. */
#define ROUNDER 0x1.8p23f

INLINE f32x8 splat(float value) { return (f32x8){value, value, value, value, value, value, value, value}; }

INLINE f32x8 choose(i32x8 is_first, f32x8 first, f32x8 second) {
    return (f32x8)((is_first & (i32x8)first) | (~is_first & (i32x8)second));
}

#ifdef __AVX2__
INLINE f32x8 smaller_of(f32x8 a, f32x8 b) { return (f32x8)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE f32x8 larger_of(f32x8 a, f32x8 b) { return (f32x8)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE f32x8 smaller_of(f32x8 a, f32x8 b) { return choose((i32x8)(a < b), a, b); }
INLINE f32x8 larger_of(f32x8 a, f32x8 b) { return choose((i32x8)(a > b), a, b); }
#endif

INLINE f32x8 magnitude_of(f32x8 v) { return (f32x8)((i32x8)v & 0x7fffffff); }
INLINE f32x8 nearest(f32x8 v) { return (v + ROUNDER) - ROUNDER; }

INLINE int any_lane(i32x8 mask) {
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) {
        any |= mask[lane];
    }
    return any != 0;
}

INLINE int64_t lanes_filled(const struct expertd_groups *groups, int64_t first) {
    return groups->n_groups - first < LANES ? groups->n_groups - first : LANES;
}

INLINE f32x8 load_weights(const struct expertd_groups *groups, int64_t place) {
    const uint8_t *values = groups->weights;
    if (groups->dtype == EXPERTD_WEIGHTS_F32) {
        return load_f32((const float *)values + place);
    }
    return load_half(values + 2 * place, LANES, groups->dtype == EXPERTD_WEIGHTS_BF16);
}

/* Load groups first … first + 7 to lanes 0 … 7; lanes beyond the last group repeat it. */
INLINE void load_bundle(const struct expertd_groups *groups, int64_t first, bundle x) {
    int64_t filled = lanes_filled(groups, first);
    for (int64_t column = 0; column < groups->group_size; column += LANES) {
        for (int64_t lane = 0; lane < LANES; lane++) {
            int64_t group = first + (lane < filled ? lane : filled - 1);
            x[column + lane] = load_weights(groups, group * groups->group_size + column);
        }
        transpose(x + column);
    }
}

/* Values of groups first … first + 7; lanes beyond the last one repeat it. */
INLINE f32x8 load_lanes(const float *values, int64_t first, int64_t filled) {
    if (filled == LANES) {
        return load_f32(values + first);
    }
    f32x8 v = splat(0.0f);
    for (int64_t lane = 0; lane < LANES; lane++) {
        v[lane] = values[first + (lane < filled ? lane : filled - 1)];
    }
    return v;
}

INLINE void store_lanes(float *values, int64_t first, int64_t filled, f32x8 v) {
    memcpy(values + first, &v, (size_t)filled * sizeof *values);
}

/* Write codes, one vector an input, to where their groups' codes lie. */
INLINE void store_codes(uint8_t *codes, const struct expertd_groups *groups, int64_t first, bundle q) {
    int64_t filled = lanes_filled(groups, first);
    for (int64_t column = 0; column < groups->group_size; column += LANES) {
        f32x8 tile[LANES];
        memcpy(tile, q + column, sizeof tile);
        transpose(tile);
        for (int64_t lane = 0; lane < filled; lane++) {
            typedef uint8_t u8x8 __attribute__((vector_size(8)));
            u8x8 bytes = __builtin_convertvector(__builtin_convertvector(tile[lane], i32x8), u8x8);
            memcpy(codes + (first + lane) * groups->group_size + column, &bytes, sizeof bytes);
        }
    }
}

#endif
