/* Products of the same activations with one or several parts: the projections of an attention, the gate, the head. */

#include "driver.h"

enum { PRODUCTS_MAX = 8, STREAMS = 4 };

struct products {
    struct matrix matrices[PRODUCTS_MAX];
    float *y[PRODUCTS_MAX];
    int64_t item_panels[PRODUCTS_MAX];
    int64_t first_item[PRODUCTS_MAX + 1];
    int64_t n_products;
    const float *x;
    int64_t cols;
    int64_t n_tokens;
    uint8_t *blocks; /* of all tiles; NULL where no matrix needs them */
};

static struct tile tile_at(const struct products *products, int64_t first_token) {
    struct tile tile = {.n_tokens = (int)least_of(TILE_TOKENS, products->n_tokens - first_token)};
    for (int token = 0; token < tile.n_tokens; token++) {
        tile.x[token] = products->x + (first_token + token) * products->cols;
    }
    if (products->blocks != NULL) {
        tile.blocks = products->blocks + blocks_nbytes(1, products->cols) * first_token;
    }
    return tile;
}

static void quantize_tile(void *context, int64_t item) {
    const struct products *products = context;
    int64_t first_token = item * TILE_TOKENS;
    struct tile tile = tile_at(products, first_token);
    uint8_t *blocks = products->blocks + blocks_nbytes(1, products->cols) * first_token;
    for (int token = 0; token < tile.n_tokens; token++) {
        kernels_in_use()->quantize(tile.x[token], products->cols / BLOCK_COLS, tile.n_tokens, token, blocks);
    }
}

static void multiply_item(void *context, int64_t item) {
    const struct products *products = context;
    int64_t i = 0;
    while (item >= products->first_item[i + 1]) {
        i++;
    }
    const struct matrix *matrix = &products->matrices[i];
    int64_t first_panel = (item - products->first_item[i]) * products->item_panels[i];
    int64_t n_panels = least_of(products->item_panels[i], matrix->plan.n_panels - first_panel);
    for (int64_t first_token = 0; first_token < products->n_tokens; first_token += TILE_TOKENS) {
        struct tile tile = tile_at(products, first_token);
        float *y[TILE_TOKENS] = {0};
        for (int token = 0; token < tile.n_tokens; token++) {
            y[token] = products->y[i] + (first_token + token) * matrix->plan.rows + first_panel * PANEL_ROWS;
        }
        matrix->multiply(&matrix->plan, first_panel, n_panels, &tile, y);
    }
}

static int open_product(const struct expertd_product *product, bool is_exact, struct products *products) {
    int64_t i = products->n_products;
    int status = open_matrix(&product->part, is_exact, &products->matrices[i]);
    if (status != EXPERTD_OK) {
        return status;
    }
    if (!is_aligned(product->y)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (product->part.cols != products->cols) {
        return EXPERTD_BAD_SHAPE;
    }
    if (!is_length_of(product->y_length, products->n_tokens, product->part.rows)) {
        return EXPERTD_BAD_LENGTH;
    }
    products->y[i] = product->y;
    products->n_products++;
    return EXPERTD_OK;
}

/* Check everything; return EXPERTD_OK and the products, or what is wrong. */
static int open_products(const struct expertd_product *given, int64_t n_products, const float *x, int64_t x_length,
                         int64_t n_tokens, bool is_exact, struct products *products) {
    if (n_products < 1 || n_products > PRODUCTS_MAX) {
        return EXPERTD_BAD_LENGTH;
    }
    if (given == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    *products = (struct products){.x = x, .cols = given[0].part.cols, .n_tokens = n_tokens};
    for (int64_t i = 0; i < n_products; i++) {
        int status = open_product(&given[i], is_exact, products);
        if (status != EXPERTD_OK) {
            return status;
        }
    }
    if (!is_aligned(x)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    return is_length_of(x_length, n_tokens, products->cols) ? EXPERTD_OK : EXPERTD_BAD_LENGTH;
}

static int run_products(struct expertd_workspace *workspace, struct products *products) {
    bool needs_int8 = false;
    for (int64_t i = 0; i < products->n_products; i++) {
        const struct matrix *matrix = &products->matrices[i];
        needs_int8 |= matrix->needs_int8;
        products->item_panels[i] = panels_per_item(matrix, products->n_tokens, n_threads_of(workspace), STREAMS);
        int64_t n_items = ceiling_of(matrix->plan.n_panels, products->item_panels[i]);
        products->first_item[i + 1] = products->first_item[i] + n_items;
    }
    if (needs_int8) {
        products->blocks = scratch(workspace, 0, blocks_nbytes(1, products->cols) * products->n_tokens);
        if (products->blocks == NULL) {
            return EXPERTD_NO_MEMORY;
        }
        share_out(workspace, quantize_tile, products, ceiling_of(products->n_tokens, TILE_TOKENS));
    }
    share_out(workspace, multiply_item, products, products->first_item[products->n_products]);
    return EXPERTD_OK;
}

int expertd_multiply(struct expertd_workspace *workspace, const struct expertd_product *given, int64_t n_products,
                     const float *x, int64_t x_length, int64_t n_tokens, int64_t is_exact) {
    struct products products;
    int status = open_products(given, n_products, x, x_length, n_tokens, is_exact != 0, &products);
    if (status != EXPERTD_OK || n_tokens == 0) {
        return status;
    }
    status = enter(workspace);
    if (status != EXPERTD_OK) {
        return status;
    }
    int64_t start_ns = now_ns();
    status = run_products(workspace, &products);
    count_products(workspace, start_ns);
    leave(workspace);
    return status;
}
