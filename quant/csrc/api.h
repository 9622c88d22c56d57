/* What the library exports. Every function checks lengths, bounds and alignment before it touches memory, reads its
 * inputs and nothing else, and writes its outputs and nothing else. The layout of a part is that of protocol/layout.py.
 *
 * Functions that take a workspace share their work among its threads, and may be called by one thread at a time for
 * each workspace. The others keep no state and may be called by many threads at once.
 *
 * Results do not depend on the number of threads, on which other tokens or experts a call computes, or on the
 * instruction set: each row of each token is added up by itself, in one order. */

#ifndef EXPERTD_API_H
#define EXPERTD_API_H

#include <stdint.h>

#define EXPERTD_ABI_VERSION 7
#define EXPERTD_EXPORT __attribute__((visibility("default")))

/* The ways a part is stored, protocol/schemes.py. */
enum expertd_format {
    EXPERTD_BF16 = 0,
    EXPERTD_FP16 = 1,
    EXPERTD_Q8_G64 = 2,
    EXPERTD_Q4_G64 = 3,
    EXPERTD_Q3_G64 = 4,
    EXPERTD_Q2_G16 = 5,
};

enum expertd_status {
    EXPERTD_OK = 0,
    EXPERTD_UNKNOWN_FORMAT = 1,
    EXPERTD_BAD_SHAPE = 2,      /* rows or cols that the format cannot store, or matrices that do not fit together */
    EXPERTD_BAD_LENGTH = 3,     /* a part, an array or a count has not the length that its shape needs */
    EXPERTD_BAD_ALIGNMENT = 4,  /* a pointer is null, or not a multiple of what it points to */
    EXPERTD_BAD_ROWS = 5,       /* the part has no such rows */
    EXPERTD_MISSING_EXPERT = 6, /* chosen, but not given */
    EXPERTD_BUSY = 7,           /* another thread computes with this workspace */
    EXPERTD_FORKED = 8,         /* the workspace's threads live in the parent of this process */
    EXPERTD_NO_WORKSPACE = 9,
    EXPERTD_NO_MEMORY = 10,
    EXPERTD_BAD_WEIGHTS = 11,   /* a weight is not finite, or too large */
    EXPERTD_NO_COPIES = 12,
};

/* A part as the caller has it: `nbytes` bytes at `bytes` that are said to be a [rows, cols] matrix. */
struct expertd_part {
    const uint8_t *bytes;
    int64_t nbytes;
    int64_t rows;
    int64_t cols;
    int64_t format; /* enum expertd_format */
};

/* An expert's matrices: gate (w1) and up (w3) [intermediate, hidden], down (w2) [hidden, intermediate]. */
struct expertd_expert {
    struct expertd_part gate;
    struct expertd_part up;
    struct expertd_part down;
};

/* One of several products of the same activations: y is [n_tokens, part.rows]. */
struct expertd_product {
    struct expertd_part part;
    float *y;
    int64_t y_length;
};

struct expertd_workspace;

EXPERTD_EXPORT int expertd_abi_version(void);

/* Compute with the kernels of that name from now on, "portable", "avx2" or "vnni", in the whole process; for tests
 * and measurements. Return EXPERTD_UNKNOWN_FORMAT if this machine has none of that name. */
EXPERTD_EXPORT int expertd_use_kernels(const char *name);

/* Return the name of the kernels in use: the fastest that this machine's instruction set has. */
EXPERTD_EXPORT const char *expertd_kernels_name(void);

/* Start n_threads - 1 threads beside the caller's. */
EXPERTD_EXPORT int expertd_workspace_start(int64_t n_threads, struct expertd_workspace **started);

/* Whether the threads wait awake for up to 100 us after each call; without it they sleep at once. */
EXPERTD_EXPORT int expertd_workspace_stay_awake(struct expertd_workspace *workspace, int64_t stays_awake);

/* products_ns = how long calls with this workspace spent in matrix products so far, from rounding activations to the last
 * sum, with what they waited for its threads: what is left of a program's time is spent outside of them. */
EXPERTD_EXPORT int expertd_workspace_products_ns(const struct expertd_workspace *workspace, int64_t *products_ns);

EXPERTD_EXPORT int expertd_workspace_stop(struct expertd_workspace *workspace);

/* out[n_rows, cols] = the weights of rows first_row …; bit for bit what quant/reference.py computes. */
EXPERTD_EXPORT int expertd_dequantize_rows(const struct expertd_part *part, int64_t first_row, int64_t n_rows,
                                           float *out, int64_t out_length);

/* y[t, row] = Σ x[t, k] weight[row, k] for each product; x is [n_tokens, cols], cols that of every part. Activations are
 * rounded to int8 for quantized parts unless the product is to be exact. */
EXPERTD_EXPORT int expertd_multiply(struct expertd_workspace *workspace, const struct expertd_product *products,
                                    int64_t n_products, const float *x, int64_t x_length, int64_t n_tokens,
                                    int64_t is_exact);

/* One layer's experts, all that were chosen in one call: the experts' table, of which the chosen may be a subset, and
 * for each token the top_k it chose and their weights. */
struct expertd_choice {
    const struct expertd_expert *const *experts; /* [n_experts], NULL where an expert is not computed by this call */
    int64_t n_experts;
    int64_t n_tokens;
    int64_t hidden_size;
    int64_t top_k;
    const float *hidden_states; /* [n_tokens, hidden_size] */
    const int64_t *expert_ids;  /* [n_tokens, top_k] */
    const float *weights;       /* [n_tokens, top_k]; may be NULL if out is */
    float *contributions;       /* [n_tokens, top_k, hidden_size]: what each expert returned for each token */
    float *out;                 /* [n_tokens, hidden_size]: their weighted sum; NULL to leave that out */
    int64_t others_are_there;   /* 1: the contributions of experts that are not given were computed before */
};

/* contributions[t, place] = down · (silu(gate · x) * (up · x)) with x = hidden_states[t], for the experts given; those
 * of the others are left as they are. With `out`, for which all chosen experts must be given or be there:
 * out[t] = weights[t, 0] contributions[t, 0] + weights[t, 1] contributions[t, 1] + …, added in that order. */
EXPERTD_EXPORT int expertd_compute_experts(struct expertd_workspace *workspace, const struct expertd_choice *choice,
                                           int64_t is_exact);

#endif
