/* Four rows by three vectors are twelve sums, which hide each other's latency and leave registers for what they are
 * made of. What is 16 bits in memory is converted on the way into a register: with one group of rows, as for a single token,
 * each number is used at once and never again. */

#include "weighted_sums_avx2.h"

#ifdef EXPERTD_HAS_AVX2

#include <immintrin.h>

#include "vectors.h"

#define UNROLL _Pragma("GCC unroll 8")
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE AVX2 static inline __attribute__((always_inline))

enum {
    VECTORS_MAX = 4,
    PREFETCH_NBYTES = 8192, /* ahead */
};

AVX2_INLINE __m256 load_vector(const void *vectors, int64_t place, bool is_fp16) {
    if (is_fp16) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)vectors + place)));
    }
    return _mm256_loadu_ps((const float *)vectors + place);
}

/* n_vectors vectors of n_rows rows, from a column on. */
AVX2_INLINE void add_piece(const struct weighted_sums *weighted, int n_rows, int n_vectors, bool is_fp16, int64_t column) {
    __m256 sums[SUM_ROWS][VECTORS_MAX];
    const float *factors = weighted->factors;
    int64_t factors_stride = weighted->factors_stride, vectors_stride = weighted->vectors_stride;
    float *out = weighted->sums + column;
    UNROLL for (int row = 0; row < n_rows; row++) {
        UNROLL for (int v = 0; v < n_vectors; v++) {
            float *at = out + row * weighted->sums_stride + v * LANES;
            sums[row][v] = weighted->begins_at_zero ? _mm256_setzero_ps() : _mm256_loadu_ps(at);
        }
    }
    int64_t place = column;
    for (int64_t i = 0; i < weighted->n_terms; i++, place += vectors_stride) {
        __m256 vectors[VECTORS_MAX];
        UNROLL for (int v = 0; v < n_vectors; v++) {
            vectors[v] = load_vector(weighted->vectors, place + v * LANES, is_fp16);
        }
        if (is_fp16) { /* straight from memory: the next block's numbers, which one thread alone would wait for */
            _mm_prefetch((const char *)weighted->vectors + 2 * place + PREFETCH_NBYTES, _MM_HINT_T0);
        }
        UNROLL for (int row = 0; row < n_rows; row++) {
            __m256 factor = _mm256_broadcast_ss(factors + row * factors_stride + i);
            UNROLL for (int v = 0; v < n_vectors; v++) {
                sums[row][v] = _mm256_fmadd_ps(vectors[v], factor, sums[row][v]);
            }
        }
    }
    UNROLL for (int row = 0; row < n_rows; row++) {
        UNROLL for (int v = 0; v < n_vectors; v++) {
            _mm256_storeu_ps(out + row * weighted->sums_stride + v * LANES, sums[row][v]);
        }
    }
}

/* Threes as long as an even number is left for twos. */
AVX2_INLINE void add_to_four_rows(const struct weighted_sums *weighted, bool is_fp16) {
    int64_t column = 0, end = weighted->n_columns;
    for (; end - column >= 6 * LANES; column += 3 * LANES) {
        add_piece(weighted, SUM_ROWS, 3, is_fp16, column);
    }
    if ((end - column) % (2 * LANES) != 0) {
        add_piece(weighted, SUM_ROWS, 3, is_fp16, column);
        column += 3 * LANES;
    }
    for (; column < end; column += 2 * LANES) {
        add_piece(weighted, SUM_ROWS, 2, is_fp16, column);
    }
}

AVX2_INLINE void add_to_one_row(const struct weighted_sums *weighted, bool is_fp16) {
    int64_t column = 0, end = weighted->n_columns;
    for (; end - column >= VECTORS_MAX * LANES; column += VECTORS_MAX * LANES) {
        add_piece(weighted, 1, VECTORS_MAX, is_fp16, column);
    }
    for (; column < end; column += 2 * LANES) {
        add_piece(weighted, 1, 2, is_fp16, column);
    }
}

AVX2 void add_weighted_sums_avx2(const struct weighted_sums *weighted) {
    if (weighted->n_rows == 1) {
        if (weighted->is_fp16) {
            add_to_one_row(weighted, true);
        } else {
            add_to_one_row(weighted, false);
        }
    } else if (weighted->is_fp16) {
        add_to_four_rows(weighted, true);
    } else {
        add_to_four_rows(weighted, false);
    }
}

#endif
