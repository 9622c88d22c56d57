/* A tile: the activations of up to four tokens, as the kernels read them. A kernel computes a whole tile with each
 * weight that it unpacks.
 *
 * For quantized parts activations are int8, one scale per block of 64 inputs: x ~ scale * q, scale = max |x| / 127.
 * A block of a tile of T tokens holds, one after another,
 *
 *     int32 words[16][T]    four neighbouring q a word: what one 32-bit lane of codes is multiplied with
 *     float scales[T]
 *     float scaled_sums[T]  scale times the sum of the 64 q: what a group's base is multiplied by
 *     int32 even[T]         sums of the first and the third 16 q, as a pair of int16: for groups of 16 inputs
 *     int32 odd[T]          likewise the second and the fourth
 *
 * so that one pointer walks through all a block needs. The words of neighbouring tokens lie together. */

#ifndef EXPERTD_TILE_H
#define EXPERTD_TILE_H

#include "part.h"
#include "vectors.h"

enum {
    TILE_TOKENS = 4,
    WORDS_PER_BLOCK = BLOCK_COLS / 4,
    TOKEN_BLOCK_NBYTES = BLOCK_COLS + 4 * 4,
};

struct tile {
    int n_tokens;
    const float *x[TILE_TOKENS]; /* rows of float activations; for 16-bit parts and exact products */
    const uint8_t *blocks;       /* the same as int8, for quantized parts; NULL if not made */
};

/* Where the fields of a block of a tile of T tokens begin. */
INLINE int64_t block_nbytes_of(int n_tokens) { return (int64_t)TOKEN_BLOCK_NBYTES * n_tokens; }
INLINE int scales_at(int n_tokens) { return BLOCK_COLS * n_tokens; }
INLINE int scaled_sums_at(int n_tokens) { return (BLOCK_COLS + 4) * n_tokens; }
INLINE int even_at(int n_tokens) { return (BLOCK_COLS + 8) * n_tokens; }
INLINE int odd_at(int n_tokens) { return (BLOCK_COLS + 12) * n_tokens; }

/* Return the length of a tile's blocks. */
INLINE int64_t blocks_nbytes(int n_tokens, int64_t cols) { return cols / BLOCK_COLS * block_nbytes_of(n_tokens); }

/* Writes n_blocks blocks of one token's activations into its places of a tile's blocks. */
typedef void quantize_function(const float *x, int64_t n_blocks, int n_tokens, int token, uint8_t *blocks);

quantize_function quantize_token_portable, quantize_token_avx2;

/* What a block is rounded by: x ~ scale * round(x * inverse). */
struct scaling {
    float scale;
    float inverse;
};

/* Return the scaling for the bits of a block's greatest magnitude. With a NaN or an infinity the scale is NaN, and so is
 * every product with the block. Below 2^-119 a block counts as 0: 1 / scale would overflow. */
INLINE struct scaling scaling_of(uint32_t greatest_bits) {
    float greatest;
    memcpy(&greatest, &greatest_bits, sizeof greatest);
    if (greatest_bits >= 0x7f800000) {
        return (struct scaling){greatest - greatest, 0};
    }
    float scale = greatest / 127.0f;
    return scale < 0x1p-126f ? (struct scaling){0, 0} : (struct scaling){scale, 1.0f / scale};
}

INLINE int32_t pair_of(int32_t low, int32_t high) { return (int32_t)(((uint32_t)low & 0xffff) | (uint32_t)high << 16); }

/* Write what stands behind a block's words; sums are those of each 16 codes. */
INLINE void store_sums(const int32_t sums[4], float scale, int n_tokens, int token, uint8_t *block) {
    float scaled_sum = scale * (float)(sums[0] + sums[1] + sums[2] + sums[3]);
    int32_t even = pair_of(sums[0], sums[2]), odd = pair_of(sums[1], sums[3]);
    memcpy(block + scales_at(n_tokens) + 4 * token, &scale, 4);
    memcpy(block + scaled_sums_at(n_tokens) + 4 * token, &scaled_sum, 4);
    memcpy(block + even_at(n_tokens) + 4 * token, &even, 4);
    memcpy(block + odd_at(n_tokens) + 4 * token, &odd, 4);
}

#endif
