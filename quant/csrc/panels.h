/* The inner kernels: rows of a part times the tokens of a tile. One set of them for each instruction set, chosen once.
 *
 * All sets compute the same bits. Dot products of codes are integers, so their order is free; what is added in floating
 * point is, for each row and token by itself, one term a block, in the order of the blocks:
 *
 *     groups of 64    sum = fma(base, scaled_sum, fma(s * scale, dot, sum))        base = fma(base_step, b, base_min)
 *     groups of 16    sum = fma(scale, fma(base_step, c, a), sum)
 *                     a = Σ s dot, c = Σ b sum_q over the block's four groups, in integers; and after the last block
 *                     sum = fma(base_min, Σ scaled_sum, sum)
 *
 * and y = scale_step * sum, with s and b the two bytes of a group, dot = Σ (q - center) x, and x, sum_q, scale and
 * scaled_sum of the activations (tile.h). A 16-bit row is added as exact.h says. */

#ifndef EXPERTD_PANELS_H
#define EXPERTD_PANELS_H

#include "tile.h"

/* Write the products of all tokens of the tile with the rows of panels first_panel … first_panel + n_panels - 1;
 * y[token] is where that token's value of the first of these rows belongs. */
typedef void panel_product(const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile,
                           float *const y[TILE_TOKENS]);

enum { N_FORMATS = EXPERTD_Q2_G16 + 1 };

struct kernels {
    const char *name;
    bool has_avx2; /* and FMA and F16C: what else has a version for these uses it */
    quantize_function *quantize;
    panel_product *int8[N_FORMATS]; /* 16-bit parts have no int8 products: theirs are the exact ones */
    panel_product *exact[N_FORMATS];
};

extern const struct kernels portable_kernels;
#ifdef EXPERTD_HAS_AVX2
extern const struct kernels avx2_kernels;
#endif
#ifdef EXPERTD_HAS_VNNI
extern const struct kernels vnni_kernels;
#endif

/* Return the kernels in use. */
const struct kernels *kernels_in_use(void);

#endif
