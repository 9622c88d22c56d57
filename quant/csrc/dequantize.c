/* Rows of a part as float32, row-major: what larger batches multiply with. */

#include "half.h"
#include "unpack.h"

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* Weights arrive with a row a lane; write lanes first … last - 1 as rows of 64 floats. */
INLINE void store_transposed(f32x8 weights[BLOCK_COLS], int64_t first, int64_t last, float *out, int64_t cols) {
    for (int k = 0; k < BLOCK_COLS; k += LANES) {
        transpose(weights + k);
        for (int64_t lane = first; lane < last; lane++) {
            store_f32(out + (lane - first) * cols + k, weights[k + lane]);
        }
    }
}

INLINE void dequantize_panels(const struct plan *plan, int nbits, int64_t first_row, int64_t n_rows,
                              float *out) {
    int64_t last_row = first_row + n_rows;
    int64_t cols = plan->n_blocks * BLOCK_COLS;
    for (int64_t index = first_row / PANEL_ROWS; index * PANEL_ROWS < last_row; index++) {
        struct panel panel = panel_at(plan, index);
        int64_t panel_row = index * PANEL_ROWS;
        int64_t first = max_of(first_row, panel_row);
        int64_t last = min_of(last_row, panel_row + PANEL_ROWS);
        for (int64_t block = 0; block < plan->n_blocks; block++) {
            f32x8 weights[BLOCK_COLS];
            unpack_block(&panel, block, nbits, weights);
            for (int k = 0; k < BLOCK_COLS; k++) {
                weights[k] *= panel.scale_step;
            }
            float *corner = out + (first - first_row) * cols + block * BLOCK_COLS;
            store_transposed(weights, first - panel_row, last - panel_row, corner, cols);
        }
    }
}

INLINE void convert_rows(const uint8_t *values, int is_bf16, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        store_f32(out + i, load_half(values + 2 * i, LANES, is_bf16));
    }
    if (i < n) {
        f32x8 last = load_half(values + 2 * i, n - i, is_bf16);
        memcpy(out + i, &last, (size_t)(n - i) * sizeof *out);
    }
}

/* One function a width: inside it nbits is a constant, and the compiler unrolls. */
DISPATCHED static void dequantize_8bit(const struct plan *plan, int64_t first_row, int64_t n_rows, float *out) {
    dequantize_panels(plan, 8, first_row, n_rows, out);
}

DISPATCHED static void dequantize_4bit(const struct plan *plan, int64_t first_row, int64_t n_rows, float *out) {
    dequantize_panels(plan, 4, first_row, n_rows, out);
}

DISPATCHED static void dequantize_3bit(const struct plan *plan, int64_t first_row, int64_t n_rows, float *out) {
    dequantize_panels(plan, 3, first_row, n_rows, out);
}

DISPATCHED static void dequantize_2bit(const struct plan *plan, int64_t first_row, int64_t n_rows, float *out) {
    dequantize_panels(plan, 2, first_row, n_rows, out);
}

DISPATCHED static void convert_bf16(const uint8_t *values, int64_t n, float *out) { convert_rows(values, 1, n, out); }

DISPATCHED static void convert_fp16(const uint8_t *values, int64_t n, float *out) { convert_rows(values, 0, n, out); }

int expertd_dequantize_rows(const struct expertd_part *part, int64_t first_row, int64_t n_rows, float *out,
                            int64_t out_length) {
    struct plan plan;
    int status = check_part(part, first_row, n_rows, &plan);
    if (status != EXPERTD_OK) {
        return status;
    }
    if (!is_aligned(out)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (out_length != n_rows * part->cols) {
        return EXPERTD_BAD_LENGTH;
    }
    const uint8_t *row = part->bytes + 2 * first_row * part->cols; /* of a 16-bit part */
    switch (part->format) {
    case EXPERTD_BF16:
        convert_bf16(row, out_length, out);
        break;
    case EXPERTD_FP16:
        convert_fp16(row, out_length, out);
        break;
    case EXPERTD_Q8_G64:
        dequantize_8bit(&plan, first_row, n_rows, out);
        break;
    case EXPERTD_Q4_G64:
        dequantize_4bit(&plan, first_row, n_rows, out);
        break;
    case EXPERTD_Q3_G64:
        dequantize_3bit(&plan, first_row, n_rows, out);
        break;
    default:
        dequantize_2bit(&plan, first_row, n_rows, out);
        break;
    }
    return EXPERTD_OK;
}
