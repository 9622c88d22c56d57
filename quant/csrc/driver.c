#include "driver.h"

/* In weights times tokens, each about a fiftieth of a nanosecond. */
static const int64_t item_least = 1 << 15;
static const int64_t item_greatest = 1 << 21;

static const int64_t items_per_thread = 8;
static const int64_t cached_nbytes = 256 * 1024;

int open_matrix(const struct expertd_part *part, bool is_exact, struct matrix *matrix) {
    int status = check_part(part, 0, part->rows, &matrix->plan);
    if (status != EXPERTD_OK) {
        return status;
    }
    const struct kernels *kernels = kernels_in_use();
    matrix->needs_int8 = !is_exact && matrix->plan.nbits != 0;
    matrix->multiply = (is_exact ? kernels->exact : kernels->int8)[matrix->plan.format];
    return EXPERTD_OK;
}

static int64_t panel_nbytes_of(const struct plan *plan) {
    return plan->nbits == 0 ? 2 * PANEL_ROWS * plan->cols : plan->panel_nbytes;
}

int64_t panels_per_item(const struct matrix *matrix, int64_t n_tokens, int64_t n_threads, int64_t unit) {
    const struct plan *plan = &matrix->plan;
    int64_t panel_work = PANEL_ROWS * plan->cols * n_tokens;
    int64_t share = ceiling_of(panel_work * plan->n_panels, n_threads * items_per_thread);
    int64_t n_panels = ceiling_of(share < item_least ? item_least : share, panel_work);
    int64_t most = n_tokens > TILE_TOKENS ? cached_nbytes / panel_nbytes_of(plan) : item_greatest / panel_work;
    int64_t n_units = ceiling_of(least_of(n_panels, most), unit);
    return n_units > 0 ? unit * n_units : unit;
}

bool is_length_of(int64_t length, int64_t n_tokens, int64_t width) {
    return n_tokens >= 0 && n_tokens <= TOKENS_MAX && width > 0 && length == n_tokens * width;
}
