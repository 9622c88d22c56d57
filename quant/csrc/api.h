/* What the library exports. Every function checks lengths, bounds and alignment before it touches memory, reads the
 * part and nothing else, writes the output and nothing else, keeps no state, and may be called by many threads at
 * once. The layout of a part is that of protocol/layout.py. */

#ifndef EXPERTD_API_H
#define EXPERTD_API_H

#include <stdint.h>

#define EXPERTD_ABI_VERSION 1
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
    EXPERTD_BAD_SHAPE = 2,     /* rows or cols that the format cannot store */
    EXPERTD_BAD_LENGTH = 3,    /* the part, or a float array, has not the length its shape needs */
    EXPERTD_BAD_ALIGNMENT = 4, /* a pointer is null or not a multiple of 4 */
    EXPERTD_BAD_ROWS = 5,      /* the part has no such rows */
};

/* A part as the caller has it: `nbytes` bytes at `bytes` that are said to be a [rows, cols] matrix. */
struct expertd_part {
    const uint8_t *bytes;
    int64_t nbytes;
    int64_t rows;
    int64_t cols;
    int64_t format; /* enum expertd_format */
};

EXPERTD_EXPORT int expertd_abi_version(void);

/* out[n_rows, cols] = the weights of rows first_row …; bit for bit what quant/reference.py computes. */
EXPERTD_EXPORT int expertd_dequantize_rows(const struct expertd_part *part, int64_t first_row, int64_t n_rows,
                                           float *out, int64_t out_length);

/* y[t, first_row + i] = sum over k of x[t, k] * weight[first_row + i, k], for all tokens and n_rows rows;
 * x is [n_tokens, cols], y is [n_tokens, rows]. Each sum is added in one order, whatever the number of tokens, the
 * range of rows and the machine: results do not depend on how the work is split. */
EXPERTD_EXPORT int expertd_multiply_rows(const struct expertd_part *part, int64_t first_row, int64_t n_rows,
                                         const float *x, int64_t x_length, int64_t n_tokens, float *y,
                                         int64_t y_length);

#endif
