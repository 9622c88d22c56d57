/* What the library exports for a layer beside its products (api.h, whose rules and statuses hold here too): norms,
 * attention over the kv_cache, the choice of experts. All arithmetic is float32, each sum in one order:
 *
 *     a sum of squares              32 partial sums, k % 32, each in the order of k; then these (rms_norm.c)
 *     a query times a key           in the order of their numbers
 *     a softmax's total             for each 512 positions 8 partial sums in the order of the keys; see attention.c
 *     a weighted sum of values      in the order of the keys
 *
 * so a token's result does not depend on which other tokens a call computes, nor on where a prompt was cut in pieces. */

#ifndef EXPERTD_LAYER_H
#define EXPERTD_LAYER_H

#include "api.h"

/* hidden_states += added, unless that is NULL; then
 * normed[t] = hidden_states[t] / sqrt(mean(hidden_states[t]^2) + eps) * weight (Zhang and Sennrich, 2019).
 * The first two and the last are of the same length, [n_tokens, weight_length]. */
EXPERTD_EXPORT int expertd_rms_norm(struct expertd_workspace *workspace, float *hidden_states, const float *added,
                                    const float *weight, int64_t weight_length, float eps, float *normed,
                                    int64_t length);

#define EXPERTD_KEY_BLOCK 32

/* The tokens of one sequence, at the positions start … start + n_tokens - 1, and where all that concerns them lies. */
struct expertd_attention {
    /* The kv_cache, fp16 or float32, divided in blocks of EXPERTD_KEY_BLOCK positions: keys [n_layers, n_kv_heads,
     * n_blocks, head_dim, EXPERTD_KEY_BLOCK], values [n_layers, n_kv_heads, context, head_dim]; each of that length. */
    void *past_keys;
    void *past_values;
    int64_t past_nbytes;
    int64_t is_fp16;
    int64_t n_layers;
    int64_t n_kv_heads;
    int64_t context; /* n_blocks * EXPERTD_KEY_BLOCK */
    int64_t head_dim;

    int64_t n_heads;  /* a multiple of n_kv_heads: neighbouring heads share keys and values */
    int64_t window;   /* how many keys a query sees at most, its own among them; from 1 to context */
    int64_t start;
    int64_t n_tokens;

    /* Of each token's rotary angles; [n_tokens, head_dim / 2]. */
    const float *cosines;
    const float *sines;
    int64_t angles_length;

    /* The tokens' rows of a step's arrays of n_rows rows each, in which first_row is their first. */
    int64_t n_rows;
    int64_t first_row;
    int64_t layer;
    const float *queries; /* [n_rows, n_heads * head_dim] */
    const float *keys;    /* [n_rows, n_kv_heads * head_dim] */
    const float *values;  /* likewise */
    float *out;           /* [n_rows, n_heads * head_dim] */
};

/* Turn queries and keys by their angles, the pairs being (i, i + head_dim / 2) (Su et al., 2021); put keys and values
 * into the kv_cache at their positions; write to `out` each query's attention over the keys at its own position and
 * before, no more than `window`: softmax(q · k / sqrt(head_dim)) · v. What else the cache holds changes nothing. */
EXPERTD_EXPORT int expertd_attend(struct expertd_workspace *workspace, const struct expertd_attention *attention);

/* For each row of gate_logits [n_tokens, n_experts] write the top_k experts of the highest logits, highest first, of
 * equals the lower id first, and the softmax over these; a NaN counts as highest of all. Both [n_tokens, top_k]. */
EXPERTD_EXPORT int expertd_choose_experts(const float *gate_logits, int64_t n_tokens, int64_t n_experts, int64_t top_k,
                                          int64_t *expert_ids, float *weights);

/* What a layer computes before its experts: its weights, and which layer it is. */
struct expertd_segment {
    const float *input_norm;          /* [hidden_size] */
    const float *post_attention_norm; /* likewise */
    int64_t hidden_size;
    struct expertd_part q_proj, k_proj, v_proj, o_proj, gate;
    int64_t layer; /* in the kv_cache */
    int64_t top_k;
    int64_t is_exact;
    float eps;
};

/* The arrays of a step, which all layers share; each is [n_tokens, …]. */
struct expertd_step {
    int64_t n_tokens;
    float *hidden_states;
    const float *added; /* what is still to be added to hidden_states; NULL if nothing is */
    float *normed;      /* like hidden_states; at the end what the experts compute with */
    float *projected;   /* likewise, for the steps between */
    float *queries, *attended; /* rows of q_proj */
    float *keys, *values;      /* rows of k_proj and of v_proj */
    float *gate_logits;        /* rows of the gate */
    int64_t *expert_ids;       /* [n_tokens, top_k] */
    float *expert_weights;     /* likewise */
    const struct expertd_attention *const *attentions; /* of the sequences; layer and arrays are filled in */
    int64_t n_attentions;
};

/* hidden_states += added, += o_proj(attention(norm(hidden_states))); normed = norm(hidden_states); expert_ids and
 * expert_weights are what the gate chooses for it. The caller vouches for the lengths of the step's arrays. */
EXPERTD_EXPORT int expertd_attention_segment(struct expertd_workspace *workspace, const struct expertd_segment *segment,
                                             const struct expertd_step *step);

/* A layer: what comes before its experts, and the table of these, NULL where one was not put there yet. */
struct expertd_layer {
    const struct expertd_segment *segment;
    const struct expertd_expert *const *experts; /* [n_experts] */
    int64_t n_experts;
};

/* Compute layers one after another, each as expertd_attention_segment and expertd_compute_experts do it. Behind each,
 * `added` [n_tokens, hidden_size] is what its experts gave and the next one adds; the first one adds the step's.
 * contributions is [n_tokens, top_k, hidden_size]. n_computed = how many were computed whole; with
 * EXPERTD_MISSING_EXPERT the next one was computed up to its experts. */
EXPERTD_EXPORT int expertd_compute_layers(struct expertd_workspace *workspace, const struct expertd_layer *layers,
                                          int64_t n_layers, const struct expertd_step *step, float *contributions,
                                          float *added, int64_t *n_computed);

/* A later layer's norm and gate, which are asked ahead of time, and room for n_tokens_max tokens. */
struct expertd_foresight {
    const float *norm; /* [hidden_size] */
    int64_t hidden_size;
    struct expertd_part gate;
    int64_t n_guessed;
    int64_t n_tokens_max;
    float *normed;      /* [n_tokens_max, hidden_size] */
    float *gate_logits; /* [n_tokens_max, gate.rows] */
    float *weights;     /* [n_tokens_max, n_guessed] */
    int64_t is_exact;
    float eps;
};

/* expert_ids [n_tokens, n_guessed]: what the gate would choose for norm(hidden_states), likeliest first; hidden_states
 * stay as they are. The caller vouches for the lengths of the arrays. */
EXPERTD_EXPORT int expertd_foresee_experts(struct expertd_workspace *workspace,
                                           const struct expertd_foresight *foresight, const float *hidden_states,
                                           int64_t n_tokens, int64_t *expert_ids);

/* out[i] = e^x[i]: what every softmax and SwiGLU here computes with; for tests of its error. */
EXPERTD_EXPORT int expertd_exponentials(const float *x, float *out, int64_t length);

#endif
