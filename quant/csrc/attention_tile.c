#include "attention_tile.h"

#include <float.h>

#include "exponential.h"

/* The position of a row's token; the rows that fill the tile up count as the last token's. */
static int64_t position_of(const struct attention_tile *tile, int64_t row) {
    return tile->position + smaller_of(row, tile->n_rows - 1) / tile->heads_per_token;
}

/* The first key of the stretch that a row sees, if it sees any. */
static int64_t seen_from(const struct attention_tile *tile, int64_t row) {
    return larger_of(0, position_of(tile, row) - tile->window + 1 - tile->stretch_position);
}

/* The key behind the last one. */
static int64_t seen_to(const struct attention_tile *tile, int64_t row) {
    return smaller_of(tile->stretch_tokens, position_of(tile, row) + 1 - tile->stretch_position);
}

void begin_tile(struct attention_tile *tile) {
    int64_t n_rows = padded_to(tile->n_rows, SUM_ROWS);
    memset(tile->sums, 0, (size_t)(n_rows * tile->width) * sizeof *tile->sums);
    for (int64_t row = 0; row < n_rows; row++) {
        tile->totals[row] = 0;
        tile->highest[row] = -FLT_MAX; /* not -infinity: a score of that has the weight 0 even if it is the first */
    }
}

void score_keys(struct attention_tile *tile, const struct attention_block *keys) {
    for (int64_t row = 0; row < tile->n_rows; row += SUM_ROWS) {
        add_weighted_sums(&(struct weighted_sums){
            .factors = tile->queries + row * tile->width,
            .factors_stride = tile->width,
            .vectors = keys->numbers,
            .vectors_stride = BLOCK_TOKENS,
            .is_fp16 = keys->is_fp16,
            .begins_at_zero = true,
            .n_rows = SUM_ROWS,
            .n_terms = tile->head_dim,
            .n_columns = BLOCK_TOKENS,
            .sums = tile->scores + row * tile->stride + keys->first,
            .sums_stride = tile->stride,
        });
    }
}

/* Only whole vectors are compared at once; a NaN never wins, and shows in the weights all the same. */
INLINE float highest_of(const float *scores, int64_t n, float highest) {
    int64_t i = 0;
    if (n >= LANES) {
        f32x8 best = load_f32(scores);
        for (i = LANES; i + LANES <= n; i += LANES) {
            f32x8 v = load_f32(scores + i);
            u32x8 is_higher = (u32x8)(v > best);
            best = (f32x8)(((u32x8)v & is_higher) | ((u32x8)best & ~is_higher));
        }
        for (int lane = 0; lane < LANES; lane++) {
            highest = best[lane] > highest ? best[lane] : highest;
        }
    }
    for (; i < n; i++) {
        highest = scores[i] > highest ? scores[i] : highest;
    }
    return highest;
}

/* Return the sum of the weights. */
INLINE float weigh_row(float *scores, int64_t n, float highest_score) {
    f32x8 highest = (f32x8){0} + highest_score, total = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32x8 weights = exponential(load_f32(scores + i) - highest);
        store_f32(scores + i, weights);
        total += weights;
    }
    if (i < n) {
        size_t nbytes = (size_t)(n - i) * sizeof *scores;
        f32x8 weights = (f32x8){0} - __builtin_inff(); /* e^-inf: the empty lanes add nothing */
        memcpy(&weights, scores + i, nbytes);
        weights = exponential(weights - highest);
        memcpy(scores + i, &weights, nbytes);
        total += weights;
    }
    return sum_of_lanes(total);
}

INLINE void rescale_row(struct attention_tile *tile, int64_t row, float highest) {
    float factor = exponential((f32x8){0} + (tile->highest[row] - highest))[0];
    tile->highest[row] = highest;
    tile->totals[row] *= factor;
    for (int64_t k = 0; k < tile->width; k++) {
        tile->sums[row * tile->width + k] *= factor;
    }
}

DISPATCHED void weigh_scores(struct attention_tile *tile) {
    for (int64_t row = 0; row < tile->n_rows; row++) {
        int64_t from = seen_from(tile, row), to = seen_to(tile, row);
        if (from >= to) {
            continue;
        }
        float *scores = tile->scores + row * tile->stride + from;
        float highest = highest_of(scores, to - from, tile->highest[row]);
        if (highest > tile->highest[row]) {
            rescale_row(tile, row, highest);
        }
        tile->totals[row] += weigh_row(scores, to - from, highest);
    }
}

/* Add the values from … to - 1 of a block to n_rows rows from `row` on. */
static void add_to_rows(struct attention_tile *tile, const struct attention_block *values, int64_t row, int n_rows,
                        int64_t from, int64_t to) {
    if (from >= to) {
        return;
    }
    int64_t skipped_nbytes = from * tile->width * (values->is_fp16 ? 2 : 4);
    add_weighted_sums(&(struct weighted_sums){
        .factors = tile->scores + row * tile->stride + values->first + from,
        .factors_stride = tile->stride,
        .vectors = (const uint8_t *)values->numbers + skipped_nbytes,
        .vectors_stride = tile->width,
        .is_fp16 = values->is_fp16,
        .n_rows = n_rows,
        .n_terms = to - from,
        .n_columns = tile->width,
        .sums = tile->sums + row * tile->width,
        .sums_stride = tile->width,
    });
}

/* A group's rows see almost the same keys. Those that all see are added for all at once; those before, which a window
 * hides from later rows, and those behind, which are later than earlier rows, for each row by itself: a weight of zero
 * would not do, as a hidden value may be a NaN. */
static void add_to_group(struct attention_tile *tile, const struct attention_block *values, int64_t first_row) {
    int64_t first = values->first, n = values->n_tokens;
    int64_t from = smaller_of(n, larger_of(0, seen_from(tile, first_row + SUM_ROWS - 1) - first));
    int64_t to = larger_of(from, smaller_of(n, seen_to(tile, first_row) - first));
    for (int64_t row = first_row; row < first_row + SUM_ROWS; row++) {
        int64_t row_from = larger_of(0, seen_from(tile, row) - first), row_to = seen_to(tile, row) - first;
        add_to_rows(tile, values, row, 1, row_from, smaller_of(from, row_to));
    }
    add_to_rows(tile, values, first_row, SUM_ROWS, from, to);
    for (int64_t row = first_row; row < first_row + SUM_ROWS; row++) {
        int64_t row_from = larger_of(to, seen_from(tile, row) - first), row_to = seen_to(tile, row) - first;
        add_to_rows(tile, values, row, 1, row_from, smaller_of(n, row_to));
    }
}

void add_values(struct attention_tile *tile, const struct attention_block *values) {
    for (int64_t row = 0; row < tile->n_rows; row += SUM_ROWS) {
        add_to_group(tile, values, row);
    }
}
