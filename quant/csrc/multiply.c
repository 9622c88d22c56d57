/* Products with the rows of a part, for few tokens: weights are expanded a block at a time into 2 KB that never leave
 * the first-level cache, and used there for all tokens.
 *
 * The order of additions is part of the contract. A sum is kept in four partial sums, since one would wait for the
 * latency of each addition: input k of a row goes to partial sum k % 4, in the order of k; 16-bit parts, where lanes
 * are inputs, do the same with vectors of 8. They are added as (0 + 1) + (2 + 3). Tokens and rows never meet. */

#include "half.h"
#include "unpack.h"

enum {
    PARTIALS = 4,
    TOKENS_PER_TILE = 8, /* partial sums of a tile: 1 KB */
};

INLINE f32x8 sum_of(const f32x8 partial[PARTIALS]) { return (partial[0] + partial[1]) + (partial[2] + partial[3]); }

/* Add the block's products with one token's 64 activations. */
INLINE void accumulate_block(const f32x8 weights[BLOCK_COLS], const float *x, f32x8 partial[PARTIALS]) {
    f32x8 s0 = partial[0], s1 = partial[1], s2 = partial[2], s3 = partial[3];
    for (int k = 0; k < BLOCK_COLS; k += PARTIALS) {
        s0 += weights[k] * x[k];
        s1 += weights[k + 1] * x[k + 1];
        s2 += weights[k + 2] * x[k + 2];
        s3 += weights[k + 3] * x[k + 3];
    }
    partial[0] = s0, partial[1] = s1, partial[2] = s2, partial[3] = s3;
}

/* What one call multiplies: rows of a part with tokens of x [n_tokens, cols], into y [n_tokens, rows]. */
struct product {
    const struct expertd_part *part;
    const struct plan *plan;
    int64_t first_row;
    int64_t last_row;
    const float *x;
    int64_t n_tokens;
    float *y;
};

INLINE void multiply_panel(const struct product *product, int64_t index, int nbits, int groups, int64_t first_token,
                           int64_t n_tokens) {
    int64_t cols = product->part->cols;
    const float *x = product->x + first_token * cols;
    struct panel panel = panel_at(product->plan, index);
    f32x8 partial[TOKENS_PER_TILE][PARTIALS] = {{{0}}};
    for (int64_t block = 0; block < product->plan->n_blocks; block++) {
        f32x8 weights[BLOCK_COLS];
        unpack_block(&panel, block, nbits, groups, weights);
        for (int64_t token = 0; token < n_tokens; token++) {
            accumulate_block(weights, x + token * cols + block * BLOCK_COLS, partial[token]);
        }
    }
    for (int64_t token = 0; token < n_tokens; token++) {
        f32x8 sum = sum_of(partial[token]);
        float *y = product->y + (first_token + token) * product->part->rows;
        for (int lane = 0; lane < PANEL_ROWS; lane++) {
            int64_t row = index * PANEL_ROWS + lane;
            if (row >= product->first_row && row < product->last_row) {
                y[row] = sum[lane];
            }
        }
    }
}

INLINE void multiply_panels(const struct product *product, int nbits, int groups) {
    for (int64_t token = 0; token < product->n_tokens; token += TOKENS_PER_TILE) {
        int64_t left = product->n_tokens - token;
        int64_t n_tokens = left < TOKENS_PER_TILE ? left : TOKENS_PER_TILE;
        for (int64_t panel = product->first_row / PANEL_ROWS; panel * PANEL_ROWS < product->last_row; panel++) {
            multiply_panel(product, panel, nbits, groups, token, n_tokens);
        }
    }
}

/* Up to 8 activations; lanes beyond are 0. */
INLINE f32x8 load_some(const float *x, int64_t n) {
    f32x8 v = {0};
    if (n >= LANES) {
        return load_f32(x);
    }
    memcpy(&v, x, (size_t)n * sizeof *x);
    return v;
}

INLINE void multiply_row(const struct product *product, int64_t row, int is_bf16, int64_t first_token,
                         int64_t n_tokens) {
    int64_t cols = product->part->cols;
    const uint8_t *values = product->part->bytes + 2 * row * cols;
    const float *x = product->x + first_token * cols;
    f32x8 partial[TOKENS_PER_TILE][PARTIALS] = {{{0}}};
    for (int64_t k = 0; k < cols; k += LANES) {
        int64_t n = cols - k < LANES ? cols - k : LANES;
        f32x8 weights = load_half(values + 2 * k, n, is_bf16);
        for (int64_t token = 0; token < n_tokens; token++) {
            partial[token][k / LANES % PARTIALS] += weights * load_some(x + token * cols + k, n);
        }
    }
    for (int64_t token = 0; token < n_tokens; token++) {
        product->y[(first_token + token) * product->part->rows + row] = sum_of_lanes(sum_of(partial[token]));
    }
}

INLINE void multiply_16bit(const struct product *product, int is_bf16) {
    for (int64_t token = 0; token < product->n_tokens; token += TOKENS_PER_TILE) {
        int64_t left = product->n_tokens - token;
        int64_t n_tokens = left < TOKENS_PER_TILE ? left : TOKENS_PER_TILE;
        for (int64_t row = product->first_row; row < product->last_row; row++) {
            multiply_row(product, row, is_bf16, token, n_tokens);
        }
    }
}

/* One function a format: inside it nbits and groups are constants, and the compiler unrolls. */
DISPATCHED static void multiply_bf16(const struct product *product) { multiply_16bit(product, 1); }

DISPATCHED static void multiply_fp16(const struct product *product) { multiply_16bit(product, 0); }

DISPATCHED static void multiply_8bit(const struct product *product) { multiply_panels(product, 8, 1); }

DISPATCHED static void multiply_4bit(const struct product *product) { multiply_panels(product, 4, 1); }

DISPATCHED static void multiply_3bit(const struct product *product) { multiply_panels(product, 3, 1); }

DISPATCHED static void multiply_2bit(const struct product *product) { multiply_panels(product, 2, 4); }

/* Return whether length is n_tokens * width, without ever multiplying what a caller sent. */
static bool is_length_of(int64_t length, int64_t n_tokens, int64_t width) {
    return n_tokens >= 0 && length >= 0 && length % width == 0 && length / width == n_tokens;
}

int expertd_multiply_rows(const struct expertd_part *part, int64_t first_row, int64_t n_rows, const float *x,
                          int64_t x_length, int64_t n_tokens, float *y, int64_t y_length) {
    struct plan plan;
    int status = check_part(part, first_row, n_rows, &plan);
    if (status != EXPERTD_OK) {
        return status;
    }
    if (!is_aligned(x) || !is_aligned(y)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (!is_length_of(x_length, n_tokens, part->cols) || !is_length_of(y_length, n_tokens, part->rows)) {
        return EXPERTD_BAD_LENGTH;
    }
    struct product product = {part, &plan, first_row, first_row + n_rows, x, n_tokens, y};
    switch (part->format) {
    case EXPERTD_BF16:
        multiply_bf16(&product);
        break;
    case EXPERTD_FP16:
        multiply_fp16(&product);
        break;
    case EXPERTD_Q8_G64:
        multiply_8bit(&product);
        break;
    case EXPERTD_Q4_G64:
        multiply_4bit(&product);
        break;
    case EXPERTD_Q3_G64:
        multiply_3bit(&product);
        break;
    default:
        multiply_2bit(&product);
        break;
    }
    return EXPERTD_OK;
}
