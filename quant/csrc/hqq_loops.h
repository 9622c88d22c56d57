/* HQQ's steps; quant/solver_reference.py has the formulas, and the same in torch.
 *
 * A bundle's groups go through all steps of a call while they lie in the first-level cache. */

#ifndef EXPERTD_HQQ_LOOPS_H
#define EXPERTD_HQQ_LOOPS_H

#include <math.h>

#include "bundle.h"

/* l_p norm and beta as the hqq package sets them. */
#define LP_NORM 0.7f
#define BETA 10.0f
/* A little below (1/beta)^(1/(2-p)) = 0.1701: an error of at most this is never shrunk. */
#define ERROR_UNSHRUNK_MAX 0.168f
#define NARROW (1.0f / 16.0f)
#define MAGNITUDE_MIN 1e-30f
#define MAGNITUDE_MAX 1e30f

INLINE float code_max_of(const struct expertd_groups *groups) { return (float)((1 << groups->nbits) - 1); }

INLINE int start_bundle(const struct expertd_groups *groups, int64_t first, float *inverse, float *zero) {
    bundle x;
    load_bundle(groups, first, x);
    f32x8 low = splat(INFINITY), high = splat(-INFINITY);
    i32x8 is_sound = (i32x8)(low == low);
    for (int64_t i = 0; i < groups->group_size; i++) {
        low = smaller_of(x[i], low);
        high = larger_of(x[i], high);
        is_sound &= (i32x8)(magnitude_of(x[i]) <= MAGNITUDE_MAX); /* a NaN is not */
    }
    f32x8 nothing = splat(0.0f);
    f32x8 magnitude = larger_of(magnitude_of(low), magnitude_of(high));
    i32x8 is_narrow = (i32x8)(high - low < magnitude * NARROW);
    low = choose(is_narrow, smaller_of(low, nothing), low);
    high = choose(is_narrow, larger_of(high, nothing), high);
    i32x8 is_empty = (i32x8)(magnitude < MAGNITUDE_MIN);
    /* Rounded twice, as torch divides a number by a tensor. */
    f32x8 lane_inverse = 1.0f / choose(is_empty, splat(1.0f), high - low) * code_max_of(groups);
    f32x8 lane_zero = -low * lane_inverse;
    if (groups->nbits == 4) {
        lane_zero = nearest(lane_zero);
    }
    int64_t filled = lanes_filled(groups, first);
    store_lanes(inverse, first, filled, choose(is_empty, nothing, lane_inverse));
    store_lanes(zero, first, filled, choose(is_empty, nothing, lane_zero));
    return !any_lane(~is_sound);
}

static int start(const struct expertd_groups *groups, float *inverse, float *zero) {
    int is_sound = 1;
    for (int64_t first = 0; first < groups->n_groups; first += LANES) {
        is_sound &= start_bundle(groups, first, inverse, zero);
    }
    return is_sound;
}

/* The codes of an input of all groups. */
INLINE f32x8 codes_of(f32x8 x, f32x8 zero, float code_max) {
    f32x8 t = larger_of(x + zero, splat(0.0f));
    return nearest(smaller_of(t, splat(code_max)));
}

/* The better zeros where an error may be an outlier: the part of it that is one is taken out of the mean. Rare. */
static f32x8 shrunk_zero(const struct expertd_groups *groups, const f32x8 *x, f32x8 zero, f32x8 scale) {
    float code_max = code_max_of(groups);
    f32x8 sum = splat(0.0f);
    for (int64_t i = 0; i < groups->group_size; i++) {
        f32x8 deviation = codes_of(x[i], zero, code_max) - x[i] - zero;
        for (int lane = 0; lane < LANES; lane++) {
            float error = -deviation[lane] * scale[lane];
            float shrunk = fabsf(error) - powf(fabsf(error), LP_NORM - 1.0f) / BETA;
            float outlier = shrunk > 0.0f ? copysignf(shrunk, error) : 0.0f;
            sum[lane] += scale[lane] > 0.0f ? deviation[lane] + outlier / scale[lane] : deviation[lane];
        }
    }
    return zero + sum / (float)groups->group_size;
}

/* Whether an error of any group is so large that it would be shrunk. */
INLINE int is_shrunk(const struct expertd_groups *groups, const f32x8 *x, f32x8 zero, f32x8 scale) {
    float code_max = code_max_of(groups);
    f32x8 largest = splat(0.0f);
    for (int64_t i = 0; i < groups->group_size; i++) {
        largest = larger_of(magnitude_of(codes_of(x[i], zero, code_max) - x[i] - zero), largest);
    }
    return any_lane((i32x8)(largest * scale > ERROR_UNSHRUNK_MAX));
}

/* One step: return the better zeros; add what the old ones lost to *error, of the groups that there are. */
INLINE f32x8 improve_bundle(const struct expertd_groups *groups, const f32x8 *x, f32x8 zero, f32x8 scale,
                            int64_t filled, double *error) {
    float code_max = code_max_of(groups);
    f32x8 deviations = splat(0.0f), distances = splat(0.0f);
    for (int64_t i = 0; i < groups->group_size; i++) {
        /* By how much the zero is off here; small, so that the sum is exact to the last bits. */
        f32x8 deviation = codes_of(x[i], zero, code_max) - x[i] - zero;
        deviations += deviation;
        distances += magnitude_of(deviation);
    }
    f32x8 errors = distances * scale;
    for (int64_t lane = 0; lane < filled; lane++) {
        *error += (double)errors[lane];
    }
    /* A group's largest error is at most the sum: mostly the sum says at once that there is nothing to shrink. */
    if (any_lane((i32x8)(errors > ERROR_UNSHRUNK_MAX)) && is_shrunk(groups, x, zero, scale)) {
        return shrunk_zero(groups, x, zero, scale);
    }
    return zero + deviations / (float)groups->group_size;
}

INLINE f32x8 scale_of(f32x8 inverse) {
    i32x8 is_empty = (i32x8)(inverse == 0.0f);
    return choose(is_empty, splat(0.0f), 1.0f / choose(is_empty, splat(1.0f), inverse));
}

static void improve(const struct expertd_groups *groups, const float *inverse, const float *zero,
                               int64_t n_steps, float *zeros, double *errors) {
    for (int64_t first = 0; first < groups->n_groups; first += LANES) {
        int64_t filled = lanes_filled(groups, first);
        f32x8 lane_inverse = load_lanes(inverse, first, filled), lane_zero = load_lanes(zero, first, filled);
        f32x8 scale = scale_of(lane_inverse);
        bundle x;
        load_bundle(groups, first, x);
        for (int64_t i = 0; i < groups->group_size; i++) {
            x[i] *= lane_inverse;
        }
        for (int64_t step = 0; step < n_steps; step++) {
            lane_zero = improve_bundle(groups, x, lane_zero, scale, filled, errors + step);
            store_lanes(zeros + step * groups->n_groups, first, filled, lane_zero);
        }
    }
}

static void write_codes(const struct expertd_groups *groups, const float *inverse, const float *zero,
                                   uint8_t *codes) {
    float code_max = code_max_of(groups);
    for (int64_t first = 0; first < groups->n_groups; first += LANES) {
        int64_t filled = lanes_filled(groups, first);
        f32x8 lane_inverse = load_lanes(inverse, first, filled), lane_zero = load_lanes(zero, first, filled);
        bundle x;
        load_bundle(groups, first, x);
        for (int64_t i = 0; i < groups->group_size; i++) {
            x[i] = codes_of(x[i] * lane_inverse, lane_zero, code_max);
        }
        store_codes(codes, groups, first, x);
    }
}

#endif
