/* 16-bit parts in AVX2: the bits of exact.c, with conversions by the machine and two rows at once, which is as many as
 * registers hold sums for. Only whole vectors of inputs are computed here; rows of another length are exact.c's. */

#include <immintrin.h>

#include "exact.h"

#define UNROLL _Pragma("GCC unroll 8")

enum { ROWS_AT_ONCE = 2, PREFETCH_VALUES = 512 };

INLINE __m256 load_weights(const uint8_t *values, int is_bf16) {
    __m128i bits = _mm_loadu_si128((const __m128i *)values);
    return is_bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)) : _mm256_cvtph_ps(bits);
}

/* Multiply rows row … row + n_rows - 1 with tokens first … first + n_tokens - 1 of the tile; both counts are constants
 * wherever this is inlined. */
INLINE void multiply_some(int n_rows, int n_tokens, const struct plan *plan, int64_t row, const struct tile *tile,
                          int first, int is_bf16, float *const y[TILE_TOKENS], int64_t y_row) {
    const uint8_t *values = plan->values + 2 * row * plan->cols;
    __m256 partial[ROWS_AT_ONCE][2][PARTIALS];
    UNROLL for (int r = 0; r < n_rows; r++) {
        UNROLL for (int token = 0; token < n_tokens; token++) {
            UNROLL for (int p = 0; p < PARTIALS; p++) {
                partial[r][token][p] = _mm256_setzero_ps();
            }
        }
    }
    int64_t k = 0;
    for (; k + PARTIALS * LANES <= plan->cols; k += PARTIALS * LANES) {
        UNROLL for (int r = 0; r < n_rows; r++) {
            _mm_prefetch((const char *)values + 2 * (r * plan->cols + k + PREFETCH_VALUES), _MM_HINT_T0);
            UNROLL for (int p = 0; p < PARTIALS; p++) {
                __m256 weights = load_weights(values + 2 * (r * plan->cols + k + p * LANES), is_bf16);
                UNROLL for (int token = 0; token < n_tokens; token++) {
                    __m256 x = _mm256_loadu_ps(tile->x[first + token] + k + p * LANES);
                    partial[r][token][p] = _mm256_add_ps(partial[r][token][p], _mm256_mul_ps(weights, x));
                }
            }
        }
    }
    UNROLL for (int p = 0; p < PARTIALS - 1; p++) { /* fewer than four vectors are left */
        if (k + p * LANES < plan->cols) {
            UNROLL for (int r = 0; r < n_rows; r++) {
                __m256 weights = load_weights(values + 2 * (r * plan->cols + k + p * LANES), is_bf16);
                UNROLL for (int token = 0; token < n_tokens; token++) {
                    __m256 x = _mm256_loadu_ps(tile->x[first + token] + k + p * LANES);
                    partial[r][token][p] = _mm256_add_ps(partial[r][token][p], _mm256_mul_ps(weights, x));
                }
            }
        }
    }
    UNROLL for (int r = 0; r < n_rows; r++) {
        UNROLL for (int token = 0; token < n_tokens; token++) {
            const __m256 *sums = partial[r][token];
            __m256 sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
            y[first + token][y_row + r] = sum_of_lanes((f32x8)sum);
        }
    }
}

INLINE void multiply_tokens(int n_rows, const struct plan *plan, int64_t row, const struct tile *tile, int is_bf16,
                            float *const y[TILE_TOKENS], int64_t y_row) {
    int token = 0;
    for (; token + 2 <= tile->n_tokens; token += 2) {
        for (int r = 0; r < n_rows; r++) {
            multiply_some(1, 2, plan, row + r, tile, token, is_bf16, y, y_row + r);
        }
    }
    if (token < tile->n_tokens) {
        multiply_some(n_rows, 1, plan, row, tile, token, is_bf16, y, y_row);
    }
}

INLINE void multiply_rows(const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile,
                          float *const y[TILE_TOKENS], int is_bf16) {
    int64_t first_row = first_panel * PANEL_ROWS, last_row = first_row + n_panels * PANEL_ROWS;
    last_row = last_row < plan->rows ? last_row : plan->rows;
    int64_t row = first_row;
    for (; row + ROWS_AT_ONCE <= last_row; row += ROWS_AT_ONCE) {
        multiply_tokens(ROWS_AT_ONCE, plan, row, tile, is_bf16, y, row - first_row);
    }
    if (row < last_row) {
        multiply_tokens(1, plan, row, tile, is_bf16, y, row - first_row);
    }
}

void rows_bf16_avx2(const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile,
                    float *const y[TILE_TOKENS]) {
    if (plan->cols % LANES == 0) {
        multiply_rows(plan, first_panel, n_panels, tile, y, 1);
    } else {
        exact_bf16(plan, first_panel, n_panels, tile, y);
    }
}

void rows_fp16_avx2(const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile,
                    float *const y[TILE_TOKENS]) {
    if (plan->cols % LANES == 0) {
        multiply_rows(plan, first_panel, n_panels, tile, y, 0);
    } else {
        exact_fp16(plan, first_panel, n_panels, tile, y);
    }
}
