/* Activations to int8 for any instruction set. */

#include "tile.h"

/* Added to a float below 2^22 it leaves the nearest integer (ties to even) in the low bits of the sum. */
#define ROUND_TO_INT 0x1.8p23f
#define ROUND_TO_INT_BITS 0x4b400000

/* Return the bits of the greatest magnitude; as integers they have the order of the floats, with infinity and then NaN
 * above all. */
INLINE uint32_t greatest_magnitude(const float x[BLOCK_COLS]) {
    uint32_t greatest = 0;
    for (int i = 0; i < BLOCK_COLS; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        greatest = bits > greatest ? bits : greatest;
    }
    return greatest;
}

/* Round 64 inputs to codes; return the sum of each 16 in `sums`. */
INLINE void round_block(const float x[BLOCK_COLS], float inverse, int8_t codes[BLOCK_COLS], int32_t sums[4]) {
    for (int i = 0; i < BLOCK_COLS; i++) {
        float shifted = x[i] * inverse + ROUND_TO_INT;
        int32_t rounded;
        memcpy(&rounded, &shifted, sizeof rounded);
        codes[i] = (int8_t)(rounded - ROUND_TO_INT_BITS);
        sums[i / 16] += codes[i];
    }
}

INLINE void quantize_block(const float x[BLOCK_COLS], int n_tokens, int token, uint8_t *block) {
    int8_t codes[BLOCK_COLS] = {0};
    int32_t sums[4] = {0};
    uint32_t greatest = greatest_magnitude(x);
    struct scaling scaling = scaling_of(greatest);
    if (greatest < 0x7f800000) {
        round_block(x, scaling.inverse, codes, sums);
    }
    for (int word = 0; word < WORDS_PER_BLOCK; word++) {
        memcpy(block + 4 * (word * n_tokens + token), codes + 4 * word, 4);
    }
    store_sums(sums, scaling.scale, n_tokens, token, block);
}

void quantize_token_portable(const float *x, int64_t n_blocks, int n_tokens, int token, uint8_t *blocks) {
    for (int64_t block = 0; block < n_blocks; block++) {
        quantize_block(x + block * BLOCK_COLS, n_tokens, token, blocks + block * block_nbytes_of(n_tokens));
    }
}
