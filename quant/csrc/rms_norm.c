/* Root mean square normalization, with the addition that comes before it in every layer. */

#include <math.h>

#include "layer.h"
#include "part.h"
#include "vectors.h"
#include "workspace.h"

enum { TOKENS_PER_ITEM = 8, PARTIALS = 4 };

struct norm {
    float *hidden_states;
    const float *added;
    const float *weight;
    float *normed;
    int64_t n_tokens;
    int64_t hidden_size;
    float eps;
};

DISPATCHED static void add_row(float *sum, const float *added, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        sum[i] += added[i];
    }
}

/* Four vectors of partial sums: one alone would wait for the latency of each addition. The rest goes to the first. */
DISPATCHED static float sum_of_squares(const float *x, int64_t n) {
    f32x8 partial[PARTIALS] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + PARTIALS * LANES <= n; i += PARTIALS * LANES) {
        for (int p = 0; p < PARTIALS; p++) {
            f32x8 v = load_f32(x + i + p * LANES);
            partial[p] += v * v;
        }
    }
    for (; i < n; i += LANES) {
        f32x8 v = {0};
        memcpy(&v, x + i, (size_t)(n - i < LANES ? n - i : LANES) * sizeof *x);
        partial[0] += v * v;
    }
    return sum_of_lanes((partial[0] + partial[1]) + (partial[2] + partial[3]));
}

DISPATCHED static void scale_row(const float *x, float factor, const float *weight, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        out[i] = x[i] * factor * weight[i];
    }
}

static void norm_item(void *context, int64_t item) {
    const struct norm *norm = context;
    int64_t n = norm->hidden_size, first = item * TOKENS_PER_ITEM;
    int64_t end = first + TOKENS_PER_ITEM < norm->n_tokens ? first + TOKENS_PER_ITEM : norm->n_tokens;
    for (int64_t token = first; token < end; token++) {
        float *x = norm->hidden_states + token * n;
        if (norm->added != NULL) {
            add_row(x, norm->added + token * n, n);
        }
        float mean = sum_of_squares(x, n) / (float)n;
        scale_row(x, 1.0f / sqrtf(mean + norm->eps), norm->weight, n, norm->normed + token * n);
    }
}

int expertd_rms_norm(struct expertd_workspace *workspace, float *hidden_states, const float *added, const float *weight,
                     int64_t weight_length, float eps, float *normed, int64_t length) {
    if (weight_length < 1 || length < 0 || length % weight_length != 0) {
        return EXPERTD_BAD_LENGTH;
    }
    if (length == 0) {
        return EXPERTD_OK; /* an empty array has no address */
    }
    if (!is_aligned(hidden_states) || (added != NULL && !is_aligned(added)) || !is_aligned(weight) ||
        !is_aligned(normed)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    int status = enter(workspace);
    if (status != EXPERTD_OK) {
        return status;
    }
    struct norm norm = {hidden_states, added, weight, normed, length / weight_length, weight_length, eps};
    share_out(workspace, norm_item, &norm, (norm.n_tokens + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM);
    leave(workspace);
    return EXPERTD_OK;
}
