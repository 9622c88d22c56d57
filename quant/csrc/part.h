/* Where the planes of a part lie, and the checks that make it safe to read them. */

#ifndef EXPERTD_PART_H
#define EXPERTD_PART_H

#include <stdbool.h>
#include <stddef.h>

#include "api.h"

enum {
    PANEL_ROWS = 8,
    BLOCK_COLS = 64,
    PLANE_ALIGNMENT = 128,
    STRIPE_METADATA_NBYTES = 64,
};

/* The planes of a quantized part; nbits is 0 for a 16-bit part, which has none but its values. */
struct plan {
    int format; /* enum expertd_format */
    int nbits;
    int64_t rows;
    int64_t cols;
    int64_t n_panels; /* of 8 rows, the last one filled up; also of a 16-bit part, where they are but a way to count */
    int64_t n_blocks;
    const uint8_t *values; /* of a 16-bit part */
    const float *scale_step;
    const float *base_min;
    const float *base_step;
    const uint8_t *panels;
    int64_t panel_nbytes;
};

/* A panel is stripes of so many blocks each, metadata before codes; nbits is a constant wherever these are inlined. */
static inline int64_t groups_per_block(int nbits) { return nbits == 2 ? 4 : 1; }
static inline int center_of(int nbits) { return nbits == 8 ? 128 : 0; } /* the code from which codes count */
static inline int64_t blocks_per_stripe(int nbits) { return 4 / groups_per_block(nbits); }
static inline int64_t block_nbytes(int nbits) { return PANEL_ROWS * BLOCK_COLS / 8 * nbits; }
static inline int64_t metadata_nbytes(int nbits) { return 2 * PANEL_ROWS * groups_per_block(nbits); }
static inline int64_t stripe_nbytes(int nbits) {
    return STRIPE_METADATA_NBYTES + blocks_per_stripe(nbits) * block_nbytes(nbits);
}

/* Return EXPERTD_OK and the plan, or what is wrong with the part or the range of rows. */
int check_part(const struct expertd_part *part, int64_t first_row, int64_t n_rows, struct plan *plan);

/* Return whether values of so many bytes may lie there at all. */
static inline bool is_aligned_to(uintptr_t nbytes, const void *values) {
    return values != NULL && (uintptr_t)values % nbytes == 0;
}

static inline bool is_aligned(const void *floats) { return is_aligned_to(4, floats); }

#endif
