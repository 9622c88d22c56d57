/* One tile of attention: the query heads of a few neighbouring tokens that share a kv head, over that head's keys and
 * values. Both come in blocks of neighbouring positions; each serves all rows of the tile. The keys of a block lie number
 * by number, so that scores are computed as the weighted sums of values are: one number of a row, broadcast, times a
 * vector. No sum runs across lanes. Knows no kv_cache. */

#ifndef EXPERTD_ATTENTION_TILE_H
#define EXPERTD_ATTENTION_TILE_H

#include "layer.h"
#include "weighted_sums.h"

enum {
    WIDTH_UNIT = SUM_COLUMNS,     /* a row of numbers is filled up with zeros to a multiple of this */
    BLOCK_TOKENS = EXPERTD_KEY_BLOCK, /* of a block of keys or of values, as the kv_cache is divided */
};

/* A tile's rows are its tokens' heads, one token after another, filled up to a multiple of SUM_ROWS. The keys of a
 * stretch of neighbouring positions are scored, then their values added, then those of the next stretch. */
struct attention_tile {
    int64_t n_rows;
    int64_t heads_per_token;
    int64_t head_dim;
    int64_t width;    /* head_dim, filled up */
    int64_t position; /* of the first token */
    int64_t window;
    int64_t stretch_position; /* of the first key of this stretch */
    int64_t stretch_tokens;
    int64_t stride;
    float *queries; /* [padded rows, width] */
    float *scores;  /* [padded rows, stride]: of each key of the stretch, then its weight */
    float *sums;    /* [padded rows, width]: of the weighted values */
    float *totals;  /* [padded rows]: of the weights */
    float *highest; /* [padded rows]: the highest score until now; weights are e^(score - highest) */
};

static inline int64_t padded_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* A block of keys [head_dim, BLOCK_TOKENS], or of values [n, width], fp16 or float32, that begins at the key `first` of
 * the stretch. */
struct attention_block {
    const void *numbers;
    bool is_fp16;
    int64_t first;
    int64_t n_tokens;
};

/* Make a tile that has seen nothing. */
void begin_tile(struct attention_tile *tile);

/* scores[:, first …] = queries · keys. The scores of keys that a row does not see are of no use. */
void score_keys(struct attention_tile *tile, const struct attention_block *keys);

/* Turn the scores of the keys that each row sees into weights and add these to `totals`. Where a score is higher than
 * all before, first bring what was added until then to the new scale. */
void weigh_scores(struct attention_tile *tile);

/* sums += weights · values, for each row those that it sees. */
void add_values(struct attention_tile *tile, const struct attention_block *values);

#endif
