/* The inner kernels: rows of a part times the tokens of a tile. One set of them for each instruction set, chosen once.
 *
 * All sets compute the same bits. Dot products of codes are integers, so their order is free; what is added in floating
 * point is, for each row and token by itself, one term a block, in the order of the blocks:
 *
 *     groups of 64    sum = fma(s * scale, fma(-zero, sum_q, dot), sum)            zero = fma(zero_step, z, zero_min)
 *     groups of 16    sum = fma(scale, fma(-zero_step, c, fma(-zero_min, b, a)), sum)
 *                     a = Σ s dot, b = Σ s sum_q, c = Σ s (z - 128) sum_q over the block's four groups, in integers;
 *                     zero_min stands for zero_min + 128 zero_step
 *
 * and y = scale_step * sum, with s and z the u8 codes of a group's scale and zero, and dot, sum_q and scale of the
 * activations (tile.h). For 8 bits dot is Σ (q - 128) x and zero is less by 128. A 16-bit row is added as exact.h says. */

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
    quantize_function *quantize;
    panel_product *int8[N_FORMATS]; /* 16-bit parts have no int8 products: theirs are the exact ones */
    panel_product *exact[N_FORMATS];
};

extern const struct kernels portable_kernels;
#ifdef EXPERTD_HAS_AVX2
extern const struct kernels avx2_kernels;
#endif

/* Return the kernels in use. */
const struct kernels *kernels_in_use(void);

#endif
