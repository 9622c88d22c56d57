/* Products with float activations: of 16-bit parts always, of quantized ones where results are to be those of the float
 * reference but for rounding. GNU vectors only, so the same code serves every instruction set. */

#ifndef EXPERTD_EXACT_H
#define EXPERTD_EXACT_H

#include "panels.h"

/* As panel_product (panels.h), for one format each. A sum is kept in four partial sums, since one would wait for the
 * latency of each addition: input k of a row goes to partial sum k % 4, in the order of k; 16-bit parts, where lanes
 * are inputs, do the same with vectors of 8. They are added as (0 + 1) + (2 + 3). */
panel_product exact_bf16, exact_fp16, exact_8bit, exact_4bit, exact_3bit, exact_2bit;
panel_product rows_bf16_avx2, rows_fp16_avx2;

enum { PARTIALS = 4 };

INLINE f32x8 sum_of(const f32x8 partial[PARTIALS]) { return (partial[0] + partial[1]) + (partial[2] + partial[3]); }

/* Write the sums of a panel's rows for one token; the last panel may have fewer than 8 rows. */
INLINE void store_rows(const struct plan *plan, int64_t panel, f32x8 sum, float *y) {
    int64_t n_rows = plan->rows - panel * PANEL_ROWS;
    if (n_rows >= PANEL_ROWS) {
        store_f32(y, sum);
    } else {
        memcpy(y, &sum, (size_t)n_rows * sizeof *y);
    }
}

#endif
