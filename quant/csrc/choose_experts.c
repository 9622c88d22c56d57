/* Which experts a token goes to: the highest of the gate's logits, in an order without ties. */

#include <stdint.h>

#include "exponential.h"
#include "layer.h"
#include "part.h"

enum { N_EXPERTS_MAX = 1 << 16 };

/* An integer that grows with the number: both zeros are equal, and every NaN is above all else. */
static int32_t rank_of(float logit) {
    if (logit != logit) {
        return INT32_MAX;
    }
    int32_t bits;
    float without_sign_of_zero = logit + 0.0f;
    memcpy(&bits, &without_sign_of_zero, sizeof bits);
    return bits >= 0 ? bits : bits ^ INT32_MAX;
}

/* Return the highest expert below the one chosen before: of a lower rank, or of the same with a higher id. */
static int64_t next_expert(const float *logits, int64_t n_experts, const int64_t *before) {
    int32_t bound = before == NULL ? INT32_MAX : rank_of(logits[*before]), best = INT32_MIN;
    int64_t first_equal = before == NULL ? 0 : *before + 1, chosen = -1;
    for (int64_t expert = 0; expert < n_experts; expert++) {
        int32_t rank = rank_of(logits[expert]);
        bool is_left = rank < bound || (rank == bound && expert >= first_equal);
        if (is_left && (chosen < 0 || rank > best)) {
            best = rank;
            chosen = expert;
        }
    }
    return chosen;
}

/* Replace the chosen logits, the highest first, by their softmax. A vector's empty lanes add nothing: e^-inf is 0. */
DISPATCHED static void soften(float *weights, int64_t n) {
    f32x8 highest = (f32x8){0} + weights[0], sum = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        size_t nbytes = (size_t)(n - i < LANES ? n - i : LANES) * sizeof *weights;
        f32x8 v = (f32x8){0} - __builtin_inff();
        memcpy(&v, weights + i, nbytes);
        v = exponential(v - highest);
        sum += v;
        memcpy(weights + i, &v, nbytes);
    }
    float total = sum_of_lanes(sum);
    for (int64_t i = 0; i < n; i++) {
        weights[i] /= total;
    }
}

int expertd_choose_experts(const float *gate_logits, int64_t n_tokens, int64_t n_experts, int64_t top_k,
                           int64_t *expert_ids, float *weights) {
    if (n_tokens < 0 || n_experts < 1 || n_experts > N_EXPERTS_MAX || top_k < 1 || top_k > n_experts) {
        return EXPERTD_BAD_LENGTH;
    }
    if (n_tokens == 0) {
        return EXPERTD_OK; /* an empty array has no address */
    }
    if (!is_aligned(gate_logits) || !is_aligned(expert_ids) || !is_aligned(weights)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    for (int64_t token = 0; token < n_tokens; token++) {
        const float *logits = gate_logits + token * n_experts;
        for (int64_t place = 0; place < top_k; place++) {
            int64_t *chosen = expert_ids + token * top_k + place;
            *chosen = next_expert(logits, n_experts, place == 0 ? NULL : chosen - 1);
            weights[token * top_k + place] = logits[*chosen];
        }
        soften(weights + token * top_k, top_k);
    }
    return EXPERTD_OK;
}

DISPATCHED static void exponentials(const float *x, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        size_t nbytes = (size_t)(n - i < LANES ? n - i : LANES) * sizeof *x;
        f32x8 v = {0};
        memcpy(&v, x + i, nbytes);
        v = exponential(v);
        memcpy(out + i, &v, nbytes);
    }
}

int expertd_exponentials(const float *x, float *out, int64_t length) {
    if (length < 0) {
        return EXPERTD_BAD_LENGTH;
    }
    if (length == 0) {
        return EXPERTD_OK;
    }
    if (!is_aligned(x) || !is_aligned(out)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    exponentials(x, out, length);
    return EXPERTD_OK;
}
