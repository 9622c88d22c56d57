/* The solver's doors: what comes in is checked here, and goes to the loops of this machine's instruction set. */

#include "solver.h"

#include <string.h>

#include "panels.h"
#include "solver_loops.h"

enum { STEPS_MAX = 64 };

static const struct solver_loops *loops_in_use(void) {
#ifdef EXPERTD_HAS_AVX2
    if (kernels_in_use()->has_avx2) {
        return &solver_loops_avx2;
    }
#endif
    return &solver_loops_portable;
}

static int check_groups(const struct expertd_groups *groups) {
    if (groups == NULL || groups->weights == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (groups->nbits < 1 || groups->nbits > 8 || groups->dtype < EXPERTD_WEIGHTS_F32 ||
        groups->dtype > EXPERTD_WEIGHTS_BF16) {
        return EXPERTD_UNKNOWN_FORMAT;
    }
    if (groups->group_size < LANES || groups->group_size > EXPERTD_GROUP_SIZE_MAX || groups->group_size % LANES != 0 ||
        groups->n_groups < 1 || groups->n_groups > (int64_t)1 << 40) {
        return EXPERTD_BAD_SHAPE;
    }
    int64_t weight_nbytes = groups->dtype == EXPERTD_WEIGHTS_F32 ? 4 : 2;
    if ((uintptr_t)groups->weights % (uintptr_t)weight_nbytes != 0) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    return groups->nbytes == groups->n_groups * groups->group_size * weight_nbytes ? EXPERTD_OK : EXPERTD_BAD_LENGTH;
}


int expertd_hqq_start(const struct expertd_groups *groups, float *inverse, float *zero) {
    int status = check_groups(groups);
    if (status != EXPERTD_OK) {
        return status;
    }
    if (inverse == NULL || zero == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    return loops_in_use()->start(groups, inverse, zero) ? EXPERTD_OK : EXPERTD_BAD_WEIGHTS;
}

int expertd_hqq_improve(const struct expertd_groups *groups, const float *inverse, const float *zero, int64_t n_steps,
                        float *zeros, double *errors) {
    int status = check_groups(groups);
    if (status != EXPERTD_OK) {
        return status;
    }
    if (inverse == NULL || zero == NULL || zeros == NULL || errors == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (n_steps < 1 || n_steps > STEPS_MAX) {
        return EXPERTD_BAD_LENGTH;
    }
    memset(errors, 0, (size_t)n_steps * sizeof *errors);
    loops_in_use()->improve(groups, inverse, zero, n_steps, zeros, errors);
    return EXPERTD_OK;
}

int expertd_hqq_codes(const struct expertd_groups *groups, const float *inverse, const float *zero, uint8_t *codes) {
    int status = check_groups(groups);
    if (status != EXPERTD_OK) {
        return status;
    }
    if (inverse == NULL || zero == NULL || codes == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    loops_in_use()->write_codes(groups, inverse, zero, codes);
    return EXPERTD_OK;
}

int expertd_refine(const struct expertd_groups *groups, const float *hqq_scale, const float *zero, float *scale,
                   float *base, float *mean_code) {
    int status = check_groups(groups);
    if (status != EXPERTD_OK) {
        return status;
    }
    if (hqq_scale == NULL || zero == NULL || scale == NULL || base == NULL || mean_code == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    loops_in_use()->refine(groups, hqq_scale, zero, scale, base, mean_code);
    return EXPERTD_OK;
}

int expertd_refine_on_grid(const struct expertd_groups *groups, const float *scale, const float *base,
                           const float *mean_code, const struct expertd_grid *grid, uint8_t *codes,
                           uint8_t *scale_codes, uint8_t *base_codes) {
    int status = check_groups(groups);
    if (status != EXPERTD_OK) {
        return status;
    }
    if (scale == NULL || base == NULL || mean_code == NULL || grid == NULL || codes == NULL || scale_codes == NULL ||
        base_codes == NULL || grid->scale_step == NULL || grid->base_min == NULL || grid->base_step == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (grid->groups_per_row < 1 || groups->n_groups % grid->groups_per_row != 0) {
        return EXPERTD_BAD_SHAPE;
    }
    loops_in_use()->refine_on_grid(groups, scale, base, mean_code, grid, codes, scale_codes, base_codes);
    return EXPERTD_OK;
}
