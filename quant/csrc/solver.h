/* The solver's inner loops, as the library exports them; quant/solver.py drives them. Like everything in api.h: each
 * function checks what it is given, keeps no state, may be called by many threads at once, and computes the same bits
 * with every instruction set. A matrix is cut into ranges of groups by whoever shares the work. */

#ifndef EXPERTD_SOLVER_H
#define EXPERTD_SOLVER_H

#include "api.h"

enum expertd_weights_dtype {
    EXPERTD_WEIGHTS_F32 = 0,
    EXPERTD_WEIGHTS_FP16 = 1,
    EXPERTD_WEIGHTS_BF16 = 2,
};

enum { EXPERTD_GROUP_SIZE_MAX = 64 };

/* n_groups groups of group_size weights (a multiple of 8, at most the above), one after another, to become codes of nbits. */
struct expertd_groups {
    const void *weights; /* [n_groups, group_size] */
    int64_t nbytes;
    int64_t dtype; /* enum expertd_weights_dtype */
    int64_t n_groups;
    int64_t group_size;
    int64_t nbits;
};

/* inverse[n_groups], zero[n_groups] = 1/scale and zero from each group's least and greatest weight; inverse is 0 for a
 * group of zeros. EXPERTD_BAD_WEIGHTS if a weight is not finite or above 1e30. */
EXPERTD_EXPORT int expertd_hqq_start(const struct expertd_groups *groups, float *inverse, float *zero);

/* zeros[n_steps, n_groups] = the zeros after each of n_steps steps of HQQ from zero[n_groups] on;
 * errors[n_steps] = the sum of the |errors| that each step found before it improved the zero. */
EXPERTD_EXPORT int expertd_hqq_improve(const struct expertd_groups *groups, const float *inverse, const float *zero,
                                       int64_t n_steps, float *zeros, double *errors);

/* codes[n_groups, group_size] of those scales and zeros. */
EXPERTD_EXPORT int expertd_hqq_codes(const struct expertd_groups *groups, const float *inverse, const float *zero,
                                     uint8_t *codes);

/* scale[n_groups] and base[n_groups] of w = scale * (q - center + base), whose sum of squared errors is at most what
 * hqq_scale and zero leave, and the mean_code[n_groups] of q - center. The center is 128 where nbits is 8, else 0. */
EXPERTD_EXPORT int expertd_refine(const struct expertd_groups *groups, const float *hqq_scale, const float *zero,
                                  float *scale, float *base, float *mean_code);

/* Where the second level's values lie: a row's groups_per_row groups share a row of the grid. */
struct expertd_grid {
    const float *scale_step; /* [n_groups / groups_per_row] */
    const float *base_min;
    const float *base_step;
    int64_t groups_per_row;
};

/* codes, scale_codes[n_groups] and base_codes[n_groups]: the best that is found near scale and base for
 * w = scale_step * (scale_code * (q - center) + base_min + base_step * base_code). */
EXPERTD_EXPORT int expertd_refine_on_grid(const struct expertd_groups *groups, const float *scale, const float *base,
                                          const float *mean_code, const struct expertd_grid *grid, uint8_t *codes,
                                          uint8_t *scale_codes, uint8_t *base_codes);

#endif
