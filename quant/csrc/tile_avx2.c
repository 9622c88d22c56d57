/* Activations to int8 in AVX2: the bits of tile.c, several times as fast. */

#include <immintrin.h>

#include "tile.h"

static const int32_t infinity_bits = 0x7f800000;

/* Return the bits of the greatest magnitude of 64 floats; as integers they have the order of the floats. */
INLINE int32_t greatest_magnitude(const __m256 x[8]) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256i greatest = _mm256_castps_si256(_mm256_and_ps(x[0], magnitude));
    for (int i = 1; i < 8; i++) {
        greatest = _mm256_max_epi32(greatest, _mm256_castps_si256(_mm256_and_ps(x[i], magnitude)));
    }
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(greatest), _mm256_extracti128_si256(greatest, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(half);
}

/* Round 32 floats to int8, in their order: the two packs work on halves of a register, which interleaves words. */
INLINE __m256i rounded(const __m256 x[4], __m256 inverse) {
    __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(x[0], inverse)), b = _mm256_cvtps_epi32(_mm256_mul_ps(x[1], inverse));
    __m256i c = _mm256_cvtps_epi32(_mm256_mul_ps(x[2], inverse)), d = _mm256_cvtps_epi32(_mm256_mul_ps(x[3], inverse));
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* Return the sums of each 16 of 64 codes, as four lanes. */
INLINE __m128i sums_of_16(__m256i first, __m256i second) {
    const __m256i ones = _mm256_set1_epi8(1), wide_ones = _mm256_set1_epi16(1);
    __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, first), wide_ones);  /* a lane for each 4 codes */
    __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, second), wide_ones);
    __m256i fours = _mm256_hadd_epi32(a, b);
    fours = _mm256_hadd_epi32(fours, fours); /* groups 0 and 2 in the lower half, 1 and 3 in the upper one */
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
}

INLINE void store_words(const int8_t codes[BLOCK_COLS], int n_tokens, int token, uint8_t *block) {
    for (int word = 0; word < WORDS_PER_BLOCK; word++) {
        memcpy(block + 4 * (word * n_tokens + token), codes + 4 * word, 4);
    }
}

INLINE void quantize_block(const float *x, int n_tokens, int token, uint8_t *block) {
    __m256 values[8];
    for (int i = 0; i < 8; i++) {
        values[i] = _mm256_loadu_ps(x + 8 * i);
    }
    int32_t greatest = greatest_magnitude(values);
    struct scaling scaling = scaling_of((uint32_t)greatest);
    __m256i first = _mm256_setzero_si256(), second = first;
    if (greatest < infinity_bits) {
        __m256 inverse = _mm256_set1_ps(scaling.inverse);
        first = rounded(values, inverse);
        second = rounded(values + 4, inverse);
    }
    if (n_tokens == 1) {
        _mm256_storeu_si256((__m256i *)block, first);
        _mm256_storeu_si256((__m256i *)(block + 32), second);
    } else {
        _Alignas(32) int8_t codes[BLOCK_COLS];
        _mm256_store_si256((__m256i *)codes, first);
        _mm256_store_si256((__m256i *)(codes + 32), second);
        store_words(codes, n_tokens, token, block);
    }
    _Alignas(16) int32_t sums[4];
    _mm_store_si128((__m128i *)sums, sums_of_16(first, second));
    store_sums(sums, scaling.scale, n_tokens, token, block);
}

void quantize_token_avx2(const float *x, int64_t n_blocks, int n_tokens, int token, uint8_t *blocks) {
    for (int64_t block = 0; block < n_blocks; block++) {
        quantize_block(x + block * BLOCK_COLS, n_tokens, token, blocks + block * block_nbytes_of(n_tokens));
    }
}
