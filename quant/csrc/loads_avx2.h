/* How kernels in AVX2 intrinsics read codes, metadata and activations, and what they fetch ahead. For files that are
 * compiled for AVX2 and more. */

#ifndef EXPERTD_LOADS_AVX2_H
#define EXPERTD_LOADS_AVX2_H

#include <immintrin.h>

#include "part.h"
#include "vectors.h"

#define UNROLL _Pragma("GCC unroll 16")

enum { VECTOR_NBYTES = 32 };

INLINE __m256i load(const uint8_t *at) { return _mm256_loadu_si256((const __m256i *)at); }

INLINE __m256i broadcast(const uint8_t *at) {
    int32_t value;
    memcpy(&value, at, sizeof value);
    return _mm256_set1_epi32(value);
}

INLINE __m256 broadcast_float(const uint8_t *at) {
    float value;
    memcpy(&value, at, sizeof value);
    return _mm256_set1_ps(value);
}

/* Eight u8 as floats. */
INLINE __m256 load_u8(const uint8_t *at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at)));
}

INLINE void prefetch_lines(const uint8_t *at, int64_t n_lines) {
    UNROLL for (int64_t line = 0; line < n_lines; line++) {
        _mm_prefetch((const char *)at + 64 * line, _MM_HINT_T0);
    }
}

/* The three values of each row of a panel that comes soon; planes are padded, so the panel behind the last one is at
 * worst another plane's. */
INLINE void prefetch_rows(const struct plan *plan, int64_t panel) {
    prefetch_lines((const uint8_t *)(plan->scale_step + panel * PANEL_ROWS), 1);
    prefetch_lines((const uint8_t *)(plan->base_min + panel * PANEL_ROWS), 1);
    prefetch_lines((const uint8_t *)(plan->base_step + panel * PANEL_ROWS), 1);
}

#endif
