#include "exact.h"

#include "half.h"
#include "unpack.h"

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

/* A block is expanded into 2 KB that never leave the first-level cache, and used there for all tokens. */
INLINE void multiply_panels(const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile,
                            float *const y[TILE_TOKENS], int nbits) {
    for (int64_t index = first_panel; index < first_panel + n_panels; index++) {
        struct panel panel = panel_at(plan, index);
        f32x8 partial[TILE_TOKENS][PARTIALS] = {{{0}}};
        for (int64_t block = 0; block < plan->n_blocks; block++) {
            f32x8 weights[BLOCK_COLS];
            unpack_block(&panel, block, nbits, weights);
            for (int token = 0; token < tile->n_tokens; token++) {
                accumulate_block(weights, tile->x[token] + block * BLOCK_COLS, partial[token]);
            }
        }
        for (int token = 0; token < tile->n_tokens; token++) {
            store_rows(plan, index, panel.scale_step * sum_of(partial[token]), y[token] + (index - first_panel) * PANEL_ROWS);
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

INLINE void multiply_row(const struct plan *plan, int64_t row, const struct tile *tile, int is_bf16,
                         float sums[TILE_TOKENS]) {
    const uint8_t *values = plan->values + 2 * row * plan->cols;
    f32x8 partial[TILE_TOKENS][PARTIALS] = {{{0}}};
    for (int64_t k = 0; k < plan->cols; k += LANES) {
        int64_t n = plan->cols - k < LANES ? plan->cols - k : LANES;
        f32x8 weights = load_half(values + 2 * k, n, is_bf16);
        for (int token = 0; token < tile->n_tokens; token++) {
            partial[token][k / LANES % PARTIALS] += weights * load_some(tile->x[token] + k, n);
        }
    }
    for (int token = 0; token < tile->n_tokens; token++) {
        sums[token] = sum_of_lanes(sum_of(partial[token]));
    }
}

INLINE void multiply_rows(const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile,
                          float *const y[TILE_TOKENS], int is_bf16) {
    int64_t first_row = first_panel * PANEL_ROWS, last_row = first_row + n_panels * PANEL_ROWS;
    last_row = last_row < plan->rows ? last_row : plan->rows;
    for (int64_t row = first_row; row < last_row; row++) {
        float sums[TILE_TOKENS];
        multiply_row(plan, row, tile, is_bf16, sums);
        for (int token = 0; token < tile->n_tokens; token++) {
            y[token][row - first_row] = sums[token];
        }
    }
}

/* One function a format: inside it nbits is a constant, and the compiler unrolls. */
#define ARGUMENTS                                                                                                      \
    const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile, float *const y[TILE_TOKENS]

DISPATCHED void exact_bf16(ARGUMENTS) { multiply_rows(plan, first_panel, n_panels, tile, y, 1); }

DISPATCHED void exact_fp16(ARGUMENTS) { multiply_rows(plan, first_panel, n_panels, tile, y, 0); }

DISPATCHED void exact_8bit(ARGUMENTS) { multiply_panels(plan, first_panel, n_panels, tile, y, 8); }

DISPATCHED void exact_4bit(ARGUMENTS) { multiply_panels(plan, first_panel, n_panels, tile, y, 4); }

DISPATCHED void exact_3bit(ARGUMENTS) { multiply_panels(plan, first_panel, n_panels, tile, y, 3); }

DISPATCHED void exact_2bit(ARGUMENTS) { multiply_panels(plan, first_panel, n_panels, tile, y, 2); }
