/* Refinement: a group's scale and offset by least squares for its codes, then the codes again, by turns, from several
 * starts; at last the same on the grid of the second level. quant/refinement.py has the reasons,
 * quant/refinement_reference.py the same in torch.
 *
 * Within a bundle a weight is seen as x = (w - middle) / half, -1 … 1, so that no square leaves the range of floats. */

#ifndef EXPERTD_REFINE_LOOPS_H
#define EXPERTD_REFINE_LOOPS_H

#include "hqq_loops.h"

enum {
    N_STARTS = 5,       /* of each end of the range */
    N_ROUNDS = 2,       /* from each start */
    N_LAST_ROUNDS = 8,  /* from the best of them */
    N_GRID_ROUNDS = 2,  /* with each scale of the grid */
    MANY_STARTS_NBITS = 4, /* with more bits than these a range's ends matter little */
};

#define SCALE_CODE_MAX 255.0f
/* What a row's step is so many times more than is nothing in that row: a group of it is not looked at more closely, or
 * the squares of its errors in a step would leave the range of floats. */
#define NEGLIGIBLE 0x1p-20f

/* x = scale * q + offset, and the sum of the squared errors of the codes that it was fitted to. */
struct fit {
    f32x8 scale, offset, error;
};

/* What a fit leaves of a group, in steps of its scale: r = (x - offset) / scale - q. */
struct sums {
    f32x8 r, rr, q, qq, rq;
};

/* How a bundle's weights are seen. */
struct view {
    f32x8 middle, half;
    i32x8 is_narrow; /* nearly constant: HQQ's own fit is kept */
    i32x8 is_empty;
};

INLINE struct view view_bundle(const struct expertd_groups *groups, f32x8 scale, f32x8 least_half, f32x8 *x) {
    f32x8 low = splat(INFINITY), high = splat(-INFINITY);
    for (int64_t i = 0; i < groups->group_size; i++) {
        low = smaller_of(x[i], low);
        high = larger_of(x[i], high);
    }
    f32x8 magnitude = larger_of(magnitude_of(low), magnitude_of(high));
    f32x8 half = larger_of((high - low) * 0.5f, least_half);
    struct view view = {
        .middle = low + (high - low) * 0.5f,
        .half = choose((i32x8)(half == 0.0f), splat(1.0f), half),
        .is_narrow = (i32x8)(high - low < magnitude * NARROW),
        .is_empty = (i32x8)(scale == 0.0f),
    };
    for (int64_t i = 0; i < groups->group_size; i++) {
        x[i] = (x[i] - view.middle) / view.half;
    }
    return view;
}

INLINE struct sums sums_of(const f32x8 *x, int64_t n, float code_max, const struct fit *fit) {
    struct sums sums = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    f32x8 inverse = 1.0f / fit->scale, zero = -fit->offset * inverse;
    for (int64_t i = 0; i < n; i++) {
        f32x8 t = x[i] * inverse + zero;
        f32x8 q = nearest(smaller_of(larger_of(t, splat(0.0f)), splat(code_max)));
        f32x8 r = t - q;
        sums.r += r;
        sums.rr += r * r;
        sums.q += q;
        sums.qq += q * q;
        sums.rq += r * q;
    }
    return sums;
}

/* Replace scale and offset by the best for their codes. */
INLINE void refit(const f32x8 *x, int64_t n, float code_max, struct fit *fit) {
    struct sums sums = sums_of(x, n, code_max, fit);
    f32x8 count = splat((float)n);
    f32x8 spread = count * sums.qq - sums.q * sums.q;
    i32x8 is_flat = (i32x8)(spread <= 0.0f); /* one code for all */
    f32x8 slope = (count * sums.rq - sums.r * sums.q) / choose(is_flat, splat(1.0f), spread);
    slope = choose(is_flat, splat(0.0f), slope);
    f32x8 lift = (sums.r - slope * sums.q) / count;
    fit->error = (sums.rr - slope * sums.rq - lift * sums.r) * fit->scale * fit->scale;
    fit->offset += fit->scale * lift;
    fit->scale += fit->scale * slope;
}

INLINE void keep_better(struct fit *best, const struct fit *other, i32x8 may_be_taken) {
    i32x8 is_better = (i32x8)(other->error < best->error) & may_be_taken;
    best->scale = choose(is_better, other->scale, best->scale);
    best->offset = choose(is_better, other->offset, best->offset);
    best->error = choose(is_better, other->error, best->error);
}

/* From HQQ's fit, which every round can only better, and from the group's range with either end drawn in. */
INLINE struct fit best_fit(const struct expertd_groups *groups, const f32x8 *x, struct fit hqq, i32x8 is_kept) {
    float code_max = code_max_of(groups);
    struct fit best = hqq;
    for (int round = 0; round < N_ROUNDS; round++) {
        refit(x, groups->group_size, code_max, &best);
    }
    float draw = groups->nbits < MANY_STARTS_NBITS ? 0.1f : 0.06f;
    int n_starts = groups->nbits > MANY_STARTS_NBITS ? 1 : N_STARTS;
    for (int start = 0; start < n_starts * n_starts; start++) {
        float low = -1.0f + draw * (float)(start / n_starts), high = 1.0f - draw * (float)(start % n_starts);
        struct fit fit = {splat((high - low) / code_max), splat(low), splat(0.0f)};
        for (int round = 0; round < N_ROUNDS; round++) {
            refit(x, groups->group_size, code_max, &fit);
        }
        keep_better(&best, &fit, ~is_kept);
    }
    for (int round = 0; round < N_LAST_ROUNDS; round++) {
        refit(x, groups->group_size, code_max, &best);
    }
    best.scale = choose(is_kept, hqq.scale, best.scale);
    best.offset = choose(is_kept, hqq.offset, best.offset);
    return best;
}

INLINE float center_of(const struct expertd_groups *groups) { return groups->nbits == 8 ? 128.0f : 0.0f; }

static void refine(const struct expertd_groups *groups, const float *hqq_scale, const float *zero, float *scale,
                   float *base, float *mean_code) {
    for (int64_t first = 0; first < groups->n_groups; first += LANES) {
        int64_t filled = lanes_filled(groups, first);
        bundle x;
        load_bundle(groups, first, x);
        f32x8 lane_hqq = load_lanes(hqq_scale, first, filled);
        struct view view = view_bundle(groups, lane_hqq, splat(0.0f), x);
        lane_hqq = choose(view.is_empty, splat(1.0f), lane_hqq);
        f32x8 hqq_offset = -load_lanes(zero, first, filled) * lane_hqq;
        struct fit hqq = {lane_hqq / view.half, (hqq_offset - view.middle) / view.half, splat(0.0f)};
        struct fit fit = best_fit(groups, x, hqq, view.is_narrow | view.is_empty);
        struct sums sums = sums_of(x, groups->group_size, code_max_of(groups), &fit);
        f32x8 lane_scale = choose(view.is_empty, splat(0.0f), fit.scale * view.half);
        f32x8 lane_base = (fit.offset + view.middle / view.half) / fit.scale + center_of(groups);
        store_lanes(scale, first, filled, lane_scale);
        store_lanes(base, first, filled, choose(view.is_empty, splat(0.0f), lane_base));
        store_lanes(mean_code, first, filled, sums.q / (float)groups->group_size - center_of(groups));
    }
}

/* The grid as a bundle sees it: x = code * step * q + (base - code * center) * step - middle / half. */
struct grid_view {
    f32x8 step, base_min, base_step, middle;
};

/* Rows' steps as they are stored; the rest is the view's. */
INLINE struct grid_view load_grid(const struct expertd_grid *grid, int64_t first, int64_t filled) {
    float step[LANES], base_min[LANES], base_step[LANES];
    for (int64_t lane = 0; lane < LANES; lane++) {
        int64_t row = (first + (lane < filled ? lane : filled - 1)) / grid->groups_per_row;
        step[lane] = grid->scale_step[row];
        base_min[lane] = grid->base_min[row];
        base_step[lane] = grid->base_step[row];
    }
    return (struct grid_view){load_f32(step), load_f32(base_min), load_f32(base_step), splat(0.0f)};
}

/* One point of the grid, and the sum of the squared errors that it leaves. */
struct point {
    f32x8 scale_code, base_code, error;
};

INLINE f32x8 divided(f32x8 v, f32x8 divisor) {
    i32x8 is_zero = (i32x8)(divisor == 0.0f);
    return choose(is_zero, splat(0.0f), v / choose(is_zero, splat(1.0f), divisor));
}

INLINE f32x8 to_code(f32x8 v) {
    return nearest(smaller_of(larger_of(v, splat(0.0f)), splat(SCALE_CODE_MAX)));
}

INLINE f32x8 offset_of(const struct grid_view *grid, const struct point *point, float center) {
    f32x8 base = grid->base_min + grid->base_step * point->base_code;
    return (base - point->scale_code * center) * grid->step - grid->middle;
}

/* Return the code of the base that gives the nearest offset. */
INLINE f32x8 base_code_of(const struct grid_view *grid, f32x8 scale_code, f32x8 offset, float center) {
    f32x8 base = divided(offset + grid->middle, grid->step) + scale_code * center;
    return to_code(divided(base - grid->base_min, grid->base_step));
}

/* Return the mean error of the point; note the sum of the squares in it, and the codes where they are asked for. */
INLINE f32x8 try_point(const f32x8 *x, int64_t n, float code_max, f32x8 scale, f32x8 offset, struct point *point,
                       f32x8 *codes) {
    f32x8 inverse = divided(splat(1.0f), scale), zero = -offset * inverse;
    f32x8 sum = splat(0.0f), squares = splat(0.0f);
    for (int64_t i = 0; i < n; i++) {
        f32x8 t = x[i] * inverse + zero;
        f32x8 q = nearest(smaller_of(larger_of(t, splat(0.0f)), splat(code_max)));
        f32x8 error = x[i] - (q * scale + offset);
        sum += error;
        squares += error * error;
        if (codes != NULL) {
            codes[i] = q;
        }
    }
    point->error = squares;
    return sum / (float)n;
}

/* With that scale and the two bases that fit it best; keep what is better. */
INLINE void try_scale(const struct expertd_groups *groups, const f32x8 *x, const struct grid_view *grid,
                      f32x8 scale_code, f32x8 offset, struct point *best) {
    float code_max = code_max_of(groups), center = center_of(groups);
    f32x8 scale = scale_code * grid->step;
    for (int round = 0; round < N_GRID_ROUNDS; round++) {
        struct point point = {scale_code, base_code_of(grid, scale_code, offset, center), splat(0.0f)};
        f32x8 stored = offset_of(grid, &point, center);
        offset = stored + try_point(x, groups->group_size, code_max, scale, stored, &point, NULL);
        i32x8 is_better = (i32x8)(point.error < best->error);
        best->scale_code = choose(is_better, point.scale_code, best->scale_code);
        best->base_code = choose(is_better, point.base_code, best->base_code);
        best->error = choose(is_better, point.error, best->error);
    }
}

INLINE struct point best_point(const struct expertd_groups *groups, const f32x8 *x, const struct grid_view *grid,
                               const struct fit *fit, f32x8 mean_code) {
    f32x8 nearest_code = to_code(divided(fit->scale, grid->step));
    struct point best = {nearest_code, splat(0.0f), splat(INFINITY)};
    for (int shift = 0; shift < 3; shift++) {
        f32x8 scale_code = to_code(nearest_code + (float)(shift == 2 ? -1 : shift));
        f32x8 offset = fit->offset + (fit->scale - scale_code * grid->step) * (mean_code + center_of(groups));
        try_scale(groups, x, grid, scale_code, offset, &best);
    }
    return best;
}

static void store_bytes(uint8_t *bytes, int64_t first, int64_t filled, f32x8 v) {
    for (int64_t lane = 0; lane < filled; lane++) {
        bytes[first + lane] = (uint8_t)v[lane];
    }
}

static void refine_on_grid(const struct expertd_groups *groups, const float *scale, const float *base,
                           const float *mean_code, const struct expertd_grid *grid, uint8_t *codes,
                           uint8_t *scale_codes, uint8_t *base_codes) {
    float center = center_of(groups);
    for (int64_t first = 0; first < groups->n_groups; first += LANES) {
        int64_t filled = lanes_filled(groups, first);
        bundle x, q;
        load_bundle(groups, first, x);
        f32x8 lane_scale = load_lanes(scale, first, filled);
        struct grid_view lanes = load_grid(grid, first, filled);
        struct view view = view_bundle(groups, lane_scale, lanes.step * NEGLIGIBLE, x);
        lanes.step /= view.half;
        lanes.middle = view.middle / view.half;
        f32x8 lane_offset = lane_scale * (load_lanes(base, first, filled) - center);
        struct fit fit = {lane_scale / view.half, (lane_offset - view.middle) / view.half, splat(0.0f)};
        struct point best = best_point(groups, x, &lanes, &fit, load_lanes(mean_code, first, filled));
        /* A group of zeros has the scale 0, and 0 is a base of its row. */
        best.scale_code = choose(view.is_empty, splat(0.0f), best.scale_code);
        best.base_code = choose(view.is_empty, base_code_of(&lanes, splat(0.0f), -lanes.middle, center), best.base_code);
        try_point(x, groups->group_size, code_max_of(groups), best.scale_code * lanes.step,
                  offset_of(&lanes, &best, center), &best, q);
        store_codes(codes, groups, first, q);
        store_bytes(scale_codes, first, filled, best.scale_code);
        store_bytes(base_codes, first, filled, best.base_code);
    }
}

#endif
