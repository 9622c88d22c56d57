#include "part.h"

/* The bounds of protocol/layout.py; with them no product below leaves 64 bits. */
static const int64_t rows_max = 1 << 24;
static const int64_t cols_max = 1 << 24;

static int64_t aligned(int64_t nbytes) { return (nbytes + PLANE_ALIGNMENT - 1) / PLANE_ALIGNMENT * PLANE_ALIGNMENT; }

static bool describe_format(int64_t format, struct plan *plan) {
    switch (format) {
    case EXPERTD_BF16:
    case EXPERTD_FP16:
        plan->nbits = 0;
        return true;
    case EXPERTD_Q8_G64:
        plan->nbits = 8;
        return true;
    case EXPERTD_Q4_G64:
        plan->nbits = 4;
        return true;
    case EXPERTD_Q3_G64:
        plan->nbits = 3;
        return true;
    case EXPERTD_Q2_G16:
        plan->nbits = 2;
        return true;
    default:
        return false;
    }
}

/* Fill in the planes; return the length that the part must have. */
static int64_t place_planes(const struct expertd_part *part, struct plan *plan) {
    plan->format = (int)part->format;
    plan->rows = part->rows;
    plan->cols = part->cols;
    plan->n_panels = (part->rows + PANEL_ROWS - 1) / PANEL_ROWS;
    plan->values = part->bytes;
    if (plan->nbits == 0) {
        plan->n_blocks = 0;
        return part->rows * part->cols * 2;
    }
    int64_t row_plane_nbytes = aligned(plan->n_panels * PANEL_ROWS * 4);
    plan->n_blocks = part->cols / BLOCK_COLS;
    plan->scale_step = (const float *)part->bytes;
    plan->base_min = (const float *)(part->bytes + row_plane_nbytes);
    plan->base_step = (const float *)(part->bytes + 2 * row_plane_nbytes);
    plan->panels = part->bytes + 3 * row_plane_nbytes;
    int64_t n_stripes = (plan->n_blocks + blocks_per_stripe(plan->nbits) - 1) / blocks_per_stripe(plan->nbits);
    plan->panel_nbytes = aligned(n_stripes * STRIPE_METADATA_NBYTES + plan->n_blocks * block_nbytes(plan->nbits));
    return 3 * row_plane_nbytes + plan->n_panels * plan->panel_nbytes;
}

int check_part(const struct expertd_part *part, int64_t first_row, int64_t n_rows, struct plan *plan) {
    if (part == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (!describe_format(part->format, plan)) {
        return EXPERTD_UNKNOWN_FORMAT;
    }
    if (part->rows < 1 || part->rows > rows_max || part->cols < 1 || part->cols > cols_max) {
        return EXPERTD_BAD_SHAPE;
    }
    if (plan->nbits != 0 && part->cols % BLOCK_COLS != 0) {
        return EXPERTD_BAD_SHAPE;
    }
    if (!is_aligned(part->bytes)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (part->nbytes != place_planes(part, plan)) {
        return EXPERTD_BAD_LENGTH;
    }
    if (first_row < 0 || n_rows < 0 || first_row > part->rows || n_rows > part->rows - first_row) {
        return EXPERTD_BAD_ROWS;
    }
    return EXPERTD_OK;
}

int expertd_abi_version(void) { return EXPERTD_ABI_VERSION; }
