/* The attention of one sequence's new tokens over its kv_cache. First keys and values are put into the cache, shared
 * out by tokens; then each kv head and tile of tokens is an item of its own. For each stretch of positions it computes
 *
 *     scores    of its keys, block by block
 *     weights   e^(score - highest score until now), which may rescale what was added before
 *     sums      of its values by the weights, block by block
 *
 * so nothing is as long as the context (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018). The
 * stretches begin at the same positions for every query, whatever the tile: that fixes the order of the additions. */

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#include "attention_tile.h"
#include "halves.h"
#include "layer.h"
#include "part.h"
#include "vectors.h"
#include "workspace.h"

enum {
    SCRATCH_SLOT = 3,
    HEAD_DIM_MAX = 4096,
    HEADS_MAX = 1 << 16,
    DIMENSION_MAX = 1 << 30, /* of everything else that is counted; with these no product below leaves 64 bits */
    TOKENS_PER_WRITE = 16,
    TILE_ROWS = 32,          /* fewer, and converting a block is much of the work */
    STRETCH_TOKENS = 512,    /* the scores of a tile stay in the second-level cache */
    STRIDE = STRETCH_TOKENS + WIDTH_UNIT, /* no whole number of kB: a column of scores would share a set of the cache */
    CACHE_LINE_NBYTES = 64,
    FETCHED_NBYTES = 8192,   /* at the beginning of a stretch; further on what adds the sums fetches ahead */
};

/* What the items of one call share. */
struct step {
    const struct expertd_attention *of;
    int64_t width; /* head_dim, filled up */
    int64_t heads_per_kv;
    int64_t tile_tokens;
    int64_t tile_rows;          /* filled up */
    int64_t n_tiles;            /* of one kv head */
    int64_t area_length;        /* floats that one item needs */
    int64_t n_areas;            /* one a thread */
    _Atomic uint32_t *is_taken; /* [n_areas] */
    float *areas;
};

/* Where an item's arrays lie in the area that it took. */
struct area {
    int64_t index;
    float *block; /* [BLOCK_TOKENS, width] */
    struct attention_tile tile;
};

/* ---- the kv_cache ---- */

static int64_t element_nbytes(const struct expertd_attention *of) { return of->is_fp16 ? 2 : 4; }

static int64_t n_blocks_of(const struct expertd_attention *of) { return of->context / BLOCK_TOKENS; }

/* The place in the cache, in elements, of the block in which a position's keys and values are. */
static int64_t block_place(const struct expertd_attention *of, int64_t kv_head, int64_t position) {
    int64_t block = position / BLOCK_TOKENS;
    return ((of->layer * of->n_kv_heads + kv_head) * n_blocks_of(of) + block) * BLOCK_TOKENS * of->head_dim;
}

static void store_key(const struct expertd_attention *of, int64_t kv_head, int64_t position, const float *key) {
    int64_t place = block_place(of, kv_head, position) + position % BLOCK_TOKENS;
    uint16_t halves[HEAD_DIM_MAX];
    if (of->is_fp16) {
        floats_to_halves(key, of->head_dim, halves);
        for (int64_t i = 0; i < of->head_dim; i++) {
            ((uint16_t *)of->past_keys)[place + i * BLOCK_TOKENS] = halves[i];
        }
    } else {
        for (int64_t i = 0; i < of->head_dim; i++) {
            ((float *)of->past_keys)[place + i * BLOCK_TOKENS] = key[i];
        }
    }
}

static void store_value(const struct expertd_attention *of, int64_t kv_head, int64_t position, const float *value) {
    int64_t place = block_place(of, kv_head, position) + position % BLOCK_TOKENS * of->head_dim;
    if (of->is_fp16) {
        floats_to_halves(value, of->head_dim, (uint16_t *)of->past_values + place);
    } else {
        memcpy((float *)of->past_values + place, value, (size_t)of->head_dim * sizeof *value);
    }
}

/* Whether blocks are read where they lie: with one group of rows each number is used once, and converted on the way. */
static bool reads_in_place(const struct step *step, const struct attention_tile *tile) {
    return !step->of->is_fp16 || tile->n_rows <= SUM_ROWS;
}

static struct attention_block load_keys(const struct step *step, const struct attention_tile *tile, int64_t place,
                                        float *floats) {
    const struct expertd_attention *of = step->of;
    const uint8_t *keys = (const uint8_t *)of->past_keys + place * element_nbytes(of);
    if (reads_in_place(step, tile)) {
        return (struct attention_block){.numbers = keys, .is_fp16 = of->is_fp16};
    }
    halves_to_floats((const uint16_t *)keys, BLOCK_TOKENS * of->head_dim, floats);
    return (struct attention_block){.numbers = floats};
}

/* The first n values of a block, each filled up with zeros. */
static struct attention_block load_values(const struct step *step, const struct attention_tile *tile, int64_t place,
                                          int64_t n, float *floats) {
    const struct expertd_attention *of = step->of;
    const uint8_t *values = (const uint8_t *)of->past_values + place * element_nbytes(of);
    bool is_whole = of->head_dim == step->width;
    if (is_whole && reads_in_place(step, tile)) {
        return (struct attention_block){.numbers = values, .is_fp16 = of->is_fp16};
    }
    int64_t n_copies = is_whole ? 1 : n, length = is_whole ? n * of->head_dim : of->head_dim;
    for (int64_t i = 0; i < n_copies; i++) {
        const uint8_t *from = values + i * length * element_nbytes(of);
        float *to = floats + i * step->width;
        if (of->is_fp16) {
            halves_to_floats((const uint16_t *)from, length, to);
        } else {
            memcpy(to, from, (size_t)length * sizeof *to);
        }
        memset(to + of->head_dim, 0, is_whole ? 0 : (size_t)(step->width - length) * sizeof *to);
    }
    return (struct attention_block){.numbers = floats};
}

/* ---- rotation, and the first part: keys and values into the cache ---- */

DISPATCHED static void rotate(const float *x, const float *cosines, const float *sines, int64_t half, float factor,
                              float *out) {
    for (int64_t i = 0; i < half; i++) {
        float left = x[i], right = x[half + i];
        out[i] = (left * cosines[i] - right * sines[i]) * factor;
        out[half + i] = (right * cosines[i] + left * sines[i]) * factor;
    }
}

static void write_item(void *context, int64_t item) {
    const struct step *step = context;
    const struct expertd_attention *of = step->of;
    int64_t first = item * TOKENS_PER_WRITE, half = of->head_dim / 2;
    int64_t end = first + TOKENS_PER_WRITE < of->n_tokens ? first + TOKENS_PER_WRITE : of->n_tokens;
    float key[HEAD_DIM_MAX];
    for (int64_t token = first; token < end; token++) {
        for (int64_t kv_head = 0; kv_head < of->n_kv_heads; kv_head++) {
            int64_t row = ((of->first_row + token) * of->n_kv_heads + kv_head) * of->head_dim;
            rotate(of->keys + row, of->cosines + token * half, of->sines + token * half, half, 1.0f, key);
            store_key(of, kv_head, of->start + token, key);
            store_value(of, kv_head, of->start + token, of->values + row);
        }
    }
}

/* ---- the second part: tiles ---- */

/* An item does not know its thread, so it takes any area that is free: there are as many as threads. */
static struct area take_area(const struct step *step) {
    struct area area = {.index = 0};
    while (atomic_exchange(&step->is_taken[area.index], 1) != 0) {
        area.index = (area.index + 1) % step->n_areas;
    }
    float *at = step->areas + area.index * step->area_length;
    struct attention_tile *tile = &area.tile;
    area.block = at;
    tile->queries = area.block + BLOCK_TOKENS * step->width;
    tile->sums = tile->queries + step->tile_rows * step->width;
    tile->totals = tile->sums + step->tile_rows * step->width;
    tile->highest = tile->totals + padded_to(step->tile_rows, WIDTH_UNIT);
    tile->scores = tile->highest + padded_to(step->tile_rows, WIDTH_UNIT);
    tile->head_dim = step->of->head_dim;
    tile->width = step->width;
    tile->stride = STRIDE;
    tile->heads_per_token = step->heads_per_kv;
    tile->window = step->of->window;
    return area;
}

static void give_area_back(const struct step *step, const struct area *area) {
    atomic_store(&step->is_taken[area->index], 0);
}

/* The place, in queries and out, of a row of a tile. */
static int64_t row_place(const struct step *step, const struct attention_tile *tile, int64_t kv_head, int64_t row) {
    const struct expertd_attention *of = step->of;
    int64_t token = tile->position - of->start + row / step->heads_per_kv;
    int64_t head = kv_head * step->heads_per_kv + row % step->heads_per_kv;
    return ((of->first_row + token) * of->n_heads + head) * of->head_dim;
}

/* Turn the tile's queries, and scale them so that their products are the scores. */
static void load_queries(const struct step *step, struct attention_tile *tile, int64_t kv_head) {
    const struct expertd_attention *of = step->of;
    int64_t half = of->head_dim / 2, n_padded = padded_to(tile->n_rows, SUM_ROWS);
    memset(tile->queries, 0, (size_t)(n_padded * tile->width) * sizeof *tile->queries);
    float factor = 1.0f / sqrtf((float)of->head_dim);
    for (int64_t row = 0; row < tile->n_rows; row++) {
        int64_t angles = (tile->position - of->start + row / step->heads_per_kv) * half;
        rotate(of->queries + row_place(step, tile, kv_head, row), of->cosines + angles, of->sines + angles, half,
               factor, tile->queries + row * tile->width);
    }
}

/* Have the processor fetch the beginning of what a stretch reads in place, at that place of the cache. */
static void fetch(const struct step *step, const void *past, int64_t place, int64_t n_keys) {
    const uint8_t *at = (const uint8_t *)past + place * element_nbytes(step->of);
    int64_t nbytes = smaller_of(FETCHED_NBYTES, n_keys * step->of->head_dim * element_nbytes(step->of));
    for (int64_t line = 0; line < nbytes; line += CACHE_LINE_NBYTES) {
        __builtin_prefetch(at + line);
    }
}

/* The keys and values of the stretch that the tile says. */
static void attend_stretch(const struct step *step, struct attention_tile *tile, int64_t kv_head, float *floats) {
    const struct expertd_attention *of = step->of;
    int64_t first_place = block_place(of, kv_head, tile->stretch_position), n_keys = tile->stretch_tokens;
    fetch(step, step->of->past_keys, first_place, n_keys);
    for (int64_t key = 0; key < n_keys; key += BLOCK_TOKENS) {
        struct attention_block keys = load_keys(step, tile, first_place + key * of->head_dim, floats);
        keys.first = key;
        score_keys(tile, &keys);
    }
    fetch(step, step->of->past_values, first_place, n_keys);
    weigh_scores(tile);
    for (int64_t key = 0; key < n_keys; key += BLOCK_TOKENS) {
        int64_t n = smaller_of(n_keys - key, BLOCK_TOKENS);
        struct attention_block values = load_values(step, tile, first_place + key * of->head_dim, n, floats);
        values.first = key;
        values.n_tokens = n;
        add_values(tile, &values);
    }
}

/* The tile sees keys from the position `first`, a block's first, to end - 1. */
static void attend_tile(const struct step *step, const struct area *area, int64_t kv_head, int64_t first, int64_t end) {
    const struct expertd_attention *of = step->of;
    struct attention_tile tile = area->tile;
    load_queries(step, &tile, kv_head);
    begin_tile(&tile);
    while (first < end) {
        tile.stretch_position = first;
        first = smaller_of(end, (first / STRETCH_TOKENS + 1) * STRETCH_TOKENS);
        tile.stretch_tokens = first - tile.stretch_position;
        attend_stretch(step, &tile, kv_head, area->block);
    }
    for (int64_t row = 0; row < tile.n_rows; row++) {
        float *out = of->out + row_place(step, &tile, kv_head, row);
        for (int64_t i = 0; i < of->head_dim; i++) {
            out[i] = tile.sums[row * tile.width + i] / tile.totals[row];
        }
    }
}

/* The first position of the first block of which the query at that position sees a key. */
static int64_t first_seen(const struct expertd_attention *of, int64_t position) {
    int64_t first = position + 1 > of->window ? position + 1 - of->window : 0;
    return first / BLOCK_TOKENS * BLOCK_TOKENS;
}

/* The last tiles come first: they see the most keys, and short items at the end leave no thread waiting for long. */
static void attend_item(void *context, int64_t item) {
    const struct step *step = context;
    const struct expertd_attention *of = step->of;
    int64_t first = (step->n_tiles - 1 - item / of->n_kv_heads) * step->tile_tokens;
    int64_t end = first + step->tile_tokens < of->n_tokens ? first + step->tile_tokens : of->n_tokens;
    struct area area = take_area(step);
    area.tile.n_rows = (end - first) * step->heads_per_kv;
    area.tile.position = of->start + first;
    attend_tile(step, &area, item % of->n_kv_heads, first_seen(of, of->start + first), of->start + end);
    give_area_back(step, &area);
}

/* ---- the call ---- */

static bool is_dimension(int64_t n) { return n >= 1 && n <= DIMENSION_MAX; }

/* Return whether `product` is a * b * c * d, without overflow on the way. */
static bool is_product(int64_t product, int64_t a, int64_t b, int64_t c, int64_t d) {
    int64_t computed;
    return !__builtin_mul_overflow(a, b, &computed) && !__builtin_mul_overflow(computed, c, &computed) &&
           !__builtin_mul_overflow(computed, d, &computed) && computed == product;
}

static int check(const struct expertd_attention *of) {
    if (!is_dimension(of->n_layers) || !is_dimension(of->n_kv_heads) || !is_dimension(of->context) ||
        !is_dimension(of->n_heads) || of->n_heads > HEADS_MAX || !is_dimension(of->n_rows) ||
        of->n_heads % of->n_kv_heads != 0 || of->head_dim < 2 || of->head_dim > HEAD_DIM_MAX || of->head_dim % 2 != 0 ||
        of->window < 1 || of->window > of->context || of->context % BLOCK_TOKENS != 0) {
        return EXPERTD_BAD_SHAPE;
    }
    if (of->layer < 0 || of->layer >= of->n_layers || of->start < 0 || of->n_tokens < 1 || of->first_row < 0 ||
        of->n_tokens > of->n_rows || of->first_row > of->n_rows - of->n_tokens || of->n_tokens > of->context ||
        of->start > of->context - of->n_tokens) {
        return EXPERTD_BAD_ROWS;
    }
    if (!is_product(of->past_nbytes, of->n_layers * of->n_kv_heads, of->context, of->head_dim, element_nbytes(of)) ||
        !is_product(of->angles_length, of->n_tokens, of->head_dim / 2, 1, 1)) {
        return EXPERTD_BAD_LENGTH;
    }
    const void *const addresses[] = {of->past_keys, of->past_values, of->cosines, of->sines,
                                     of->queries,   of->keys,        of->values,  of->out};
    for (size_t i = 0; i < sizeof addresses / sizeof *addresses; i++) {
        if (!is_aligned(addresses[i])) {
            return EXPERTD_BAD_ALIGNMENT;
        }
    }
    return EXPERTD_OK;
}

/* Cut the work into tiles, of so many tokens that TILE_ROWS rows share a block. How it is cut changes no result. */
static struct step plan_step(const struct expertd_attention *of, int64_t n_threads) {
    struct step step = {.of = of, .n_areas = n_threads, .heads_per_kv = of->n_heads / of->n_kv_heads};
    step.tile_tokens = smaller_of(larger_of(1, TILE_ROWS / step.heads_per_kv), of->n_tokens);
    step.n_tiles = (of->n_tokens + step.tile_tokens - 1) / step.tile_tokens;
    step.tile_rows = padded_to(step.tile_tokens * step.heads_per_kv, SUM_ROWS);
    step.width = padded_to(of->head_dim, WIDTH_UNIT);
    step.area_length = (BLOCK_TOKENS + 2 * step.tile_rows) * step.width + 2 * padded_to(step.tile_rows, WIDTH_UNIT) +
                       step.tile_rows * STRIDE;
    return step;
}

static int attend(struct expertd_workspace *workspace, const struct expertd_attention *of) {
    struct step step = plan_step(of, n_threads_of(workspace));
    int64_t flags_nbytes = padded_to(step.n_areas * (int64_t)sizeof *step.is_taken, CACHE_LINE_NBYTES);
    int64_t areas_nbytes = step.n_areas * step.area_length * (int64_t)sizeof *step.areas;
    uint8_t *memory = scratch(workspace, SCRATCH_SLOT, flags_nbytes + areas_nbytes);
    if (memory == NULL) {
        return EXPERTD_NO_MEMORY;
    }
    memset(memory, 0, (size_t)flags_nbytes);
    step.is_taken = (_Atomic uint32_t *)memory;
    step.areas = (float *)(memory + flags_nbytes);
    share_out(workspace, write_item, &step, (of->n_tokens + TOKENS_PER_WRITE - 1) / TOKENS_PER_WRITE);
    share_out(workspace, attend_item, &step, step.n_tiles * of->n_kv_heads);
    return EXPERTD_OK;
}

int expertd_attend(struct expertd_workspace *workspace, const struct expertd_attention *attention) {
    if (attention == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    int status = check(attention);
    if (status == EXPERTD_OK) {
        status = enter(workspace);
    }
    if (status != EXPERTD_OK) {
        return status;
    }
    status = attend(workspace, attention);
    leave(workspace);
    return status;
}
