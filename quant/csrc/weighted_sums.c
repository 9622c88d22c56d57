#include "weighted_sums.h"

#include <math.h>

#include "half.h"
#include "panels.h"
#include "weighted_sums_avx2.h"

#define UNROLL _Pragma("GCC unroll 8")

INLINE f32x8 fma_lanes(f32x8 vector, float factor, f32x8 sum) {
    for (int lane = 0; lane < LANES; lane++) {
        sum[lane] = fmaf(vector[lane], factor, sum[lane]);
    }
    return sum;
}

INLINE f32x8 load_vector(const struct weighted_sums *weighted, int64_t place) {
    if (weighted->is_fp16) {
        return load_half((const uint8_t *)weighted->vectors + 2 * place, LANES, 0);
    }
    return load_f32((const float *)weighted->vectors + place);
}

/* Eight columns of n_rows rows. */
INLINE void add_column(const struct weighted_sums *weighted, int n_rows, int64_t column) {
    f32x8 sums[SUM_ROWS];
    float *out = weighted->sums + column;
    UNROLL for (int row = 0; row < n_rows; row++) {
        sums[row] = weighted->begins_at_zero ? (f32x8){0} : load_f32(out + row * weighted->sums_stride);
    }
    for (int64_t i = 0; i < weighted->n_terms; i++) {
        f32x8 vector = load_vector(weighted, i * weighted->vectors_stride + column);
        UNROLL for (int row = 0; row < n_rows; row++) {
            sums[row] = fma_lanes(vector, weighted->factors[row * weighted->factors_stride + i], sums[row]);
        }
    }
    UNROLL for (int row = 0; row < n_rows; row++) {
        store_f32(out + row * weighted->sums_stride, sums[row]);
    }
}

static void add_weighted_sums_portably(const struct weighted_sums *weighted) {
    for (int64_t column = 0; column < weighted->n_columns; column += LANES) {
        if (weighted->n_rows == 1) {
            add_column(weighted, 1, column);
        } else {
            add_column(weighted, SUM_ROWS, column);
        }
    }
}

void add_weighted_sums(const struct weighted_sums *weighted) {
#ifdef EXPERTD_HAS_AVX2
    if (kernels_in_use()->has_avx2) {
        add_weighted_sums_avx2(weighted);
        return;
    }
#endif
    add_weighted_sums_portably(weighted);
}
