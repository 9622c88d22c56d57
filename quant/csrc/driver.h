/* What the exported products share: how much of a matrix one item of work is, and tiles made of rows of activations. */

#ifndef EXPERTD_DRIVER_H
#define EXPERTD_DRIVER_H

#include "panels.h"
#include "workspace.h"

enum {
    TOKENS_MAX = 1 << 15, /* of one call */
};

/* A part ready to be multiplied with: checked, its kernel chosen. */
struct matrix {
    struct plan plan;
    panel_product *multiply;
    bool needs_int8; /* the kernel reads a tile's blocks, not its floats */
};

/* Return EXPERTD_OK and the matrix, or what is wrong with the part. */
int open_matrix(const struct expertd_part *part, bool is_exact, struct matrix *matrix);

/* Return into how many panels of the matrix an item of work is to be cut, a multiple of `unit`: few enough that all
 * threads have work to the end and that an item's weights stay in the second-level cache while several tiles use them,
 * enough that taking the item costs little beside it. */
int64_t panels_per_item(const struct matrix *matrix, int64_t n_tokens, int64_t n_threads, int64_t unit);

INLINE int64_t ceiling_of(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* Return whether there may be so many tokens, and length is n_tokens * width. */
bool is_length_of(int64_t length, int64_t n_tokens, int64_t width);

#endif
