/* A layer's experts in one call: up, gate, SwiGLU, down, weighted sum, for every token the experts that it chose.
 *
 * Tokens are grouped by expert, so that an expert's weights are read once for all tokens that chose it. Experts are
 * computed in rounds: as many at once as keeps all threads busy, few enough that what lies between the products stays
 * small. A round has three steps, each shared among the threads, each waiting for the one before:
 *
 *     quantize   the tokens' hidden states to tiles, one a group of up to four tokens of an expert
 *     inner      rows of gate and up for all tiles, silu(gate) * up, and that as tiles again
 *     outer      rows of down for all tiles, into the contributions
 *
 * Each contribution is stored by itself and added in the gate's order at the end: where and when an expert was computed
 * never shows. */

#include "driver.h"
#include "exponential.h"

enum {
    EXPERTS_MAX = 1024, /* of a layer */
    USES_MAX = 1 << 20, /* of experts by tokens, in one call */
    HIDDEN_SIZE_MAX = 1 << 24,
    ROUND_USES = 64,
    INNER_UNIT = BLOCK_COLS / PANEL_ROWS, /* an item's rows are whole blocks of the next product's inputs */
    INNER_PANELS_MAX = 64,
    OUTER_UNIT = 4,
};

enum scratch_slot { USES_SLOT, X_SLOT, INNER_SLOT };

/* One token's use of an expert: its place in expert_ids. */
typedef int32_t use;

/* One expert of a round. */
struct task {
    struct matrix gate, up, down;
    const use *uses;
    int64_t n_uses;
    uint8_t *x_blocks;     /* tiles of the hidden states; NULL where neither gate nor up needs them */
    uint8_t *inner_blocks; /* tiles of the inner activations; NULL where down reads floats */
    float *inner;          /* [n_uses, intermediate] where down reads floats */
    int64_t inner_panels;  /* of an item */
    int64_t outer_panels;
    int64_t first_tile, first_inner_item, first_outer_item; /* how many those of the tasks before have */
};

struct round {
    const struct expertd_choice *choice;
    struct task tasks[ROUND_USES + 1]; /* the last one holds the totals */
    int64_t n_tasks;
};

static bool needs_x_blocks(const struct task *task) { return task->gate.needs_int8 || task->up.needs_int8; }

static int64_t n_tiles_of(const struct task *task) { return ceiling_of(task->n_uses, TILE_TOKENS); }

static const float *hidden_states_of(const struct expertd_choice *choice, use use) {
    return choice->hidden_states + use / choice->top_k * choice->hidden_size;
}

static struct tile x_tile(const struct round *round, const struct task *task, int64_t first_use) {
    struct tile tile = {.n_tokens = (int)least_of(TILE_TOKENS, task->n_uses - first_use)};
    for (int token = 0; token < tile.n_tokens; token++) {
        tile.x[token] = hidden_states_of(round->choice, task->uses[first_use + token]);
    }
    if (task->x_blocks != NULL) {
        tile.blocks = task->x_blocks + first_use * blocks_nbytes(1, task->gate.plan.cols);
    }
    return tile;
}

static struct tile inner_tile(const struct task *task, int64_t first_use) {
    struct tile tile = {.n_tokens = (int)least_of(TILE_TOKENS, task->n_uses - first_use)};
    int64_t cols = task->down.plan.cols;
    if (task->inner_blocks != NULL) {
        tile.blocks = task->inner_blocks + first_use * blocks_nbytes(1, cols);
    }
    for (int token = 0; token < tile.n_tokens && task->inner != NULL; token++) {
        tile.x[token] = task->inner + (first_use + token) * cols;
    }
    return tile;
}

static void quantize_item(void *context, int64_t item) {
    const struct round *round = context;
    const struct task *task = round->tasks;
    while (item >= task[1].first_tile) {
        task++;
    }
    if (task->x_blocks == NULL) {
        return;
    }
    int64_t first_use = (item - task->first_tile) * TILE_TOKENS, cols = task->gate.plan.cols;
    struct tile tile = x_tile(round, task, first_use);
    uint8_t *blocks = task->x_blocks + first_use * blocks_nbytes(1, cols);
    for (int token = 0; token < tile.n_tokens; token++) {
        kernels_in_use()->quantize(tile.x[token], cols / BLOCK_COLS, tile.n_tokens, token, blocks);
    }
}

/* gate[i] = silu(gate[i]) * up[i], silu(x) = x / (1 + exp(-x)) (Shazeer, GLU Variants Improve Transformer, 2020); n is a
 * multiple of 8, what lies beyond a matrix's rows is ignored later. */
DISPATCHED static void swiglu(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        f32x8 x = load_f32(gate + i);
        store_f32(gate + i, x / (1.0f + exponential(-x)) * load_f32(up + i));
    }
}

/* Put one token's inner activations, rows first_row … of the gate, where the down product reads them. */
static void store_inner(const struct task *task, const struct tile *tile, int token, int64_t first_use,
                        int64_t first_row, int64_t n_rows, const float *values) {
    int64_t cols = task->down.plan.cols;
    if (task->inner != NULL) {
        memcpy(task->inner + (first_use + token) * cols + first_row, values, (size_t)n_rows * sizeof *values);
        return;
    }
    uint8_t *blocks = task->inner_blocks + first_use * blocks_nbytes(1, cols);
    uint8_t *first_block = blocks + first_row / BLOCK_COLS * block_nbytes_of(tile->n_tokens);
    kernels_in_use()->quantize(values, n_rows / BLOCK_COLS, tile->n_tokens, token, first_block);
}

static void inner_item(void *context, int64_t item) {
    const struct round *round = context;
    const struct task *task = round->tasks;
    while (item >= task[1].first_inner_item) {
        task++;
    }
    int64_t first_panel = (item - task->first_inner_item) * task->inner_panels;
    int64_t n_panels = least_of(task->inner_panels, task->gate.plan.n_panels - first_panel);
    int64_t first_row = first_panel * PANEL_ROWS;
    int64_t n_rows = least_of(n_panels * PANEL_ROWS, task->gate.plan.rows - first_row);
    for (int64_t first_use = 0; first_use < task->n_uses; first_use += TILE_TOKENS) {
        struct tile tile = x_tile(round, task, first_use);
        _Alignas(32) float gate[TILE_TOKENS][INNER_PANELS_MAX * PANEL_ROWS], up[TILE_TOKENS][INNER_PANELS_MAX * PANEL_ROWS];
        float *gate_rows[TILE_TOKENS] = {gate[0], gate[1], gate[2], gate[3]};
        float *up_rows[TILE_TOKENS] = {up[0], up[1], up[2], up[3]};
        task->gate.multiply(&task->gate.plan, first_panel, n_panels, &tile, gate_rows);
        task->up.multiply(&task->up.plan, first_panel, n_panels, &tile, up_rows);
        for (int token = 0; token < tile.n_tokens; token++) {
            swiglu(gate[token], up[token], n_panels * PANEL_ROWS);
            store_inner(task, &tile, token, first_use, first_row, n_rows, gate[token]);
        }
    }
}

static void outer_item(void *context, int64_t item) {
    const struct round *round = context;
    const struct task *task = round->tasks;
    while (item >= task[1].first_outer_item) {
        task++;
    }
    int64_t first_panel = (item - task->first_outer_item) * task->outer_panels;
    int64_t n_panels = least_of(task->outer_panels, task->down.plan.n_panels - first_panel);
    for (int64_t first_use = 0; first_use < task->n_uses; first_use += TILE_TOKENS) {
        struct tile tile = inner_tile(task, first_use);
        float *y[TILE_TOKENS] = {0};
        for (int token = 0; token < tile.n_tokens; token++) {
            int64_t place = task->uses[first_use + token];
            y[token] = round->choice->contributions + place * round->choice->hidden_size + first_panel * PANEL_ROWS;
        }
        task->down.multiply(&task->down.plan, first_panel, n_panels, &tile, y);
    }
}

/* Return EXPERTD_OK and the expert's matrices, or what is wrong with them. */
static int open_expert(const struct expertd_expert *expert, int64_t hidden_size, bool is_exact, struct task *task) {
    int status = open_matrix(&expert->gate, is_exact, &task->gate);
    if (status == EXPERTD_OK) {
        status = open_matrix(&expert->up, is_exact, &task->up);
    }
    if (status == EXPERTD_OK) {
        status = open_matrix(&expert->down, is_exact, &task->down);
    }
    if (status != EXPERTD_OK) {
        return status;
    }
    const struct plan *gate = &task->gate.plan, *up = &task->up.plan, *down = &task->down.plan;
    bool fits = gate->cols == hidden_size && up->cols == hidden_size && down->rows == hidden_size &&
                gate->rows == up->rows && gate->rows == down->cols;
    return fits ? EXPERTD_OK : EXPERTD_BAD_SHAPE;
}

static int64_t x_nbytes_of(const struct task *task) {
    return needs_x_blocks(task) ? task->n_uses * blocks_nbytes(1, task->gate.plan.cols) : 0;
}

static int64_t inner_nbytes_of(const struct task *task) {
    int64_t cols = task->down.plan.cols;
    int64_t nbytes = task->down.needs_int8 ? blocks_nbytes(1, cols) : cols * (int64_t)sizeof(float);
    return ceiling_of(task->n_uses * nbytes, 64) * 64;
}

/* Cut the round's work into items and give it its memory; return EXPERTD_OK or EXPERTD_NO_MEMORY. */
static int plan_round(struct expertd_workspace *workspace, struct round *round) {
    int64_t n_threads = n_threads_of(workspace), x_nbytes = 0, inner_nbytes = 0;
    for (int64_t i = 0; i < round->n_tasks; i++) {
        struct task *task = &round->tasks[i], *next = task + 1;
        int64_t inner = panels_per_item(&task->gate, 2 * task->n_uses, n_threads, INNER_UNIT);
        task->inner_panels = least_of(inner, INNER_PANELS_MAX);
        task->outer_panels = panels_per_item(&task->down, task->n_uses, n_threads, OUTER_UNIT);
        next->first_tile = task->first_tile + n_tiles_of(task);
        next->first_inner_item = task->first_inner_item + ceiling_of(task->gate.plan.n_panels, task->inner_panels);
        next->first_outer_item = task->first_outer_item + ceiling_of(task->down.plan.n_panels, task->outer_panels);
        x_nbytes += x_nbytes_of(task);
        inner_nbytes += inner_nbytes_of(task);
    }
    uint8_t *x = scratch(workspace, X_SLOT, x_nbytes), *inner = scratch(workspace, INNER_SLOT, inner_nbytes);
    if ((x == NULL && x_nbytes > 0) || inner == NULL) {
        return EXPERTD_NO_MEMORY;
    }
    for (int64_t i = 0; i < round->n_tasks; i++) {
        struct task *task = &round->tasks[i];
        task->x_blocks = needs_x_blocks(task) ? x : NULL;
        task->inner_blocks = task->down.needs_int8 ? inner : NULL;
        task->inner = task->down.needs_int8 ? NULL : (float *)inner;
        x += x_nbytes_of(task);
        inner += inner_nbytes_of(task);
    }
    return EXPERTD_OK;
}

static int run_round(struct expertd_workspace *workspace, struct round *round) {
    int status = plan_round(workspace, round);
    if (status == EXPERTD_OK) {
        const struct task *totals = &round->tasks[round->n_tasks];
        share_out(workspace, quantize_item, round, totals->first_tile);
        share_out(workspace, inner_item, round, totals->first_inner_item);
        share_out(workspace, outer_item, round, totals->first_outer_item);
    }
    return status;
}

/* Sort the uses by expert, in the order of tokens for each; first[e] … first[e + 1] - 1 are those of expert e. */
static void group_uses(const struct expertd_choice *choice, int64_t first[EXPERTS_MAX + 1], use *uses) {
    int64_t n_uses = choice->n_tokens * choice->top_k, next[EXPERTS_MAX] = {0};
    for (int64_t i = 0; i < n_uses; i++) {
        next[choice->expert_ids[i]]++;
    }
    first[0] = 0;
    for (int64_t expert = 0; expert < choice->n_experts; expert++) {
        first[expert + 1] = first[expert] + next[expert];
        next[expert] = first[expert];
    }
    for (int64_t i = 0; i < n_uses; i++) {
        uses[next[choice->expert_ids[i]]++] = (use)i;
    }
}

static int run_rounds(struct expertd_workspace *workspace, const struct expertd_choice *choice, bool is_exact) {
    use *uses = scratch(workspace, USES_SLOT, choice->n_tokens * choice->top_k * (int64_t)sizeof *uses);
    if (uses == NULL) {
        return EXPERTD_NO_MEMORY;
    }
    int64_t first[EXPERTS_MAX + 1], n_uses = 0;
    group_uses(choice, first, uses);
    struct round round = {.choice = choice};
    int status = EXPERTD_OK;
    for (int64_t expert = 0; expert < choice->n_experts && status == EXPERTD_OK; expert++) {
        int64_t n = first[expert + 1] - first[expert];
        if (choice->experts[expert] == NULL || n == 0) {
            continue;
        }
        if (n_uses > 0 && n_uses + n > ROUND_USES) {
            status = run_round(workspace, &round);
            round = (struct round){.choice = choice};
            n_uses = 0;
        }
        struct task *task = &round.tasks[round.n_tasks++];
        task->uses = uses + first[expert];
        task->n_uses = n;
        n_uses += n;
        int opened = open_expert(choice->experts[expert], choice->hidden_size, is_exact, task);
        status = status == EXPERTD_OK ? opened : status;
    }
    return status == EXPERTD_OK && n_uses > 0 ? run_round(workspace, &round) : status;
}

struct weighted_sum {
    const struct expertd_choice *choice;
    int64_t item_tokens;
};

/* out = weights[0] contributions[0] + weights[1] contributions[1] + …, each operation rounded by itself. */
DISPATCHED static void sum_contributions(const float *contributions, const float *weights, int64_t top_k, int64_t n,
                                         float *out) {
    for (int64_t i = 0; i < n; i++) {
        float sum = weights[0] * contributions[i];
        for (int64_t place = 1; place < top_k; place++) {
            sum += weights[place] * contributions[place * n + i];
        }
        out[i] = sum;
    }
}

static void sum_item(void *context, int64_t item) {
    const struct weighted_sum *sum = context;
    const struct expertd_choice *choice = sum->choice;
    int64_t first = item * sum->item_tokens, last = least_of(first + sum->item_tokens, choice->n_tokens);
    for (int64_t token = first; token < last; token++) {
        const float *contributions = choice->contributions + token * choice->top_k * choice->hidden_size;
        sum_contributions(contributions, choice->weights + token * choice->top_k, choice->top_k, choice->hidden_size,
                          choice->out + token * choice->hidden_size);
    }
}

static void sum_all(struct expertd_workspace *workspace, const struct expertd_choice *choice) {
    static const int64_t item_work = 1 << 15; /* additions */
    struct weighted_sum sum = {choice, ceiling_of(item_work, choice->top_k * choice->hidden_size)};
    share_out(workspace, sum_item, &sum, ceiling_of(choice->n_tokens, sum.item_tokens));
}

/* Return EXPERTD_OK if every id that was chosen names an expert of the table; for a sum it has to be given or there. */
static int check_ids(const struct expertd_choice *choice) {
    bool need_all = choice->out != NULL && !choice->others_are_there;
    for (int64_t i = 0; i < choice->n_tokens * choice->top_k; i++) {
        int64_t expert = choice->expert_ids[i];
        if (expert < 0 || expert >= choice->n_experts || (need_all && choice->experts[expert] == NULL)) {
            return EXPERTD_MISSING_EXPERT;
        }
    }
    return EXPERTD_OK;
}

static int check_choice(const struct expertd_choice *choice) {
    if (choice == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (choice->n_experts < 1 || choice->n_experts > EXPERTS_MAX || choice->hidden_size < 1 ||
        choice->hidden_size > HIDDEN_SIZE_MAX || choice->top_k < 1 ||
        choice->top_k > choice->n_experts || choice->n_tokens < 0 || choice->n_tokens > USES_MAX / choice->top_k) {
        return EXPERTD_BAD_LENGTH;
    }
    if (choice->n_tokens == 0) {
        return EXPERTD_OK;
    }
    bool are_aligned = is_aligned(choice->hidden_states) && is_aligned(choice->contributions) &&
                       is_aligned_to(8, choice->expert_ids) && is_aligned_to(8, choice->experts);
    if (!are_aligned || (choice->out != NULL && (!is_aligned(choice->out) || !is_aligned(choice->weights)))) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    return check_ids(choice);
}

int expertd_compute_experts(struct expertd_workspace *workspace, const struct expertd_choice *choice,
                            int64_t is_exact) {
    int status = check_choice(choice);
    if (status != EXPERTD_OK || choice->n_tokens == 0) {
        return status;
    }
    status = enter(workspace);
    if (status != EXPERTD_OK) {
        return status;
    }
    int64_t start_ns = now_ns();
    status = run_rounds(workspace, choice, is_exact != 0);
    if (status == EXPERTD_OK && choice->out != NULL) {
        sum_all(workspace, choice);
    }
    count_products(workspace, start_ns);
    leave(workspace);
    return status;
}
