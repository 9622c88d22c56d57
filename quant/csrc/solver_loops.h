/* The solver's loops once for each instruction set, and which set is used. */

#ifndef EXPERTD_SOLVER_LOOPS_H
#define EXPERTD_SOLVER_LOOPS_H

#include "solver.h"

/* The functions of solver.h behind their checks; start returns whether the weights are sound. */
struct solver_loops {
    int (*start)(const struct expertd_groups *groups, float *inverse, float *zero);
    void (*improve)(const struct expertd_groups *groups, const float *inverse, const float *zero, int64_t n_steps,
                    float *zeros, double *errors);
    void (*write_codes)(const struct expertd_groups *groups, const float *inverse, const float *zero, uint8_t *codes);
    void (*refine)(const struct expertd_groups *groups, const float *hqq_scale, const float *zero, float *scale,
                   float *base, float *mean_code);
    void (*refine_on_grid)(const struct expertd_groups *groups, const float *scale, const float *base,
                           const float *mean_code, const struct expertd_grid *grid, uint8_t *codes,
                           uint8_t *scale_codes, uint8_t *base_codes);
};

extern const struct solver_loops solver_loops_portable;
#ifdef EXPERTD_HAS_AVX2
extern const struct solver_loops solver_loops_avx2;
#endif

#endif
