/* The int8 kernels with AVX-512VL and VNNI: the layout of lanes is that of panels_avx2.c, but `vpdpbusd` multiplies four
 * codes of a row with four activations and adds all four to the row's 32-bit sum in one instruction, and takes the
 * activations from memory while it broadcasts them.
 *
 * What makes them as fast as memory, beside that:
 *   - 256-bit vectors: a panel has eight rows, and processors that have 512 bits in two passes lose nothing.
 *   - Codes are masked where they lie, not shifted down, if their place stays the same for many words: sums of codes times
 *     a power of two are exact, and are shifted back once a block.
 *   - One panel at a time: it is one stream of memory, which the processor's own prefetcher follows, and is told of what
 *     comes far ahead.
 *
 * Arrays below are registers: their lengths are constants wherever a function is inlined, and all loops unroll. */

#include "exact.h"
#include "loads_avx2.h"

/* Measured on Zen 4: nearer, and the memory is waited for; further, and what came has left the first-level cache. */
enum { NBYTES_AHEAD = 4096 };

/* What the rows of a panel share. */
struct rows {
    __m256 scale_step;
    __m256 base_min;
    __m256 base_step;
};

INLINE __m256i masked(__m256i codes, int mask) { return _mm256_and_si256(codes, _mm256_set1_epi8((char)mask)); }

/* (a & mask) | b */
INLINE __m256i merged_by(__m256i a, int mask, __m256i b) {
    return _mm256_ternarylogic_epi32(a, _mm256_set1_epi8((char)mask), b, 0xea);
}

/* sums + codes · the word of activations at x. In assembler, since compilers load and broadcast the word by an instruction
 * of its own, one in five of all. */
INLINE __m256i add_products(__m256i sums, __m256i codes, const uint8_t *x) {
    typedef int32_t word __attribute__((may_alias, aligned(1)));
    __asm__("vpdpbusd %2%{1to8%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*(const word *)x));
    return sums;
}

/* Add a word of codes times that word of each token to the tokens' sums. */
INLINE void add_word(int n_tokens, __m256i codes, const uint8_t *x, int word, __m256i sums[TILE_TOKENS]) {
    UNROLL for (int token = 0; token < n_tokens; token++) {
        sums[token] = add_products(sums[token], codes, x + 4 * (word * n_tokens + token));
    }
}

INLINE void clear(int n_tokens, __m256i sums[TILE_TOKENS]) {
    UNROLL for (int token = 0; token < n_tokens; token++) {
        sums[token] = _mm256_setzero_si256();
    }
}

/* dots += sums / 2^bits, which is exact where all codes in the sums stood `bits` above their place. */
INLINE void add_shifted(int n_tokens, const __m256i sums[TILE_TOKENS], int bits, __m256i dots[TILE_TOKENS]) {
    UNROLL for (int token = 0; token < n_tokens; token++) {
        dots[token] = _mm256_add_epi32(dots[token], _mm256_srai_epi32(sums[token], bits));
    }
}

/* 8 bits: Σ (q - 128) x = Σ q x - 128 Σ x, the latter from the four sums of 16 that a block of activations has. */
INLINE void dot_8bit(int n_tokens, const uint8_t *codes, const uint8_t *x, __m256i dots[TILE_TOKENS]) {
    __m256i odd[TILE_TOKENS];
    UNROLL for (int token = 0; token < n_tokens; token++) {
        __m256i center = _mm256_set1_epi16(-128);
        dots[token] = _mm256_madd_epi16(center, broadcast(x + even_at(n_tokens) + 4 * token));
        odd[token] = _mm256_madd_epi16(center, broadcast(x + odd_at(n_tokens) + 4 * token));
    }
    UNROLL for (int word = 0; word < WORDS_PER_BLOCK; word += 2) {
        add_word(n_tokens, load(codes + word * VECTOR_NBYTES), x, word, dots);
        add_word(n_tokens, load(codes + (word + 1) * VECTOR_NBYTES), x, word + 1, odd);
    }
    add_shifted(n_tokens, odd, 0, dots);
}

INLINE void dot_4bit(int n_tokens, const uint8_t *codes, const uint8_t *x, __m256i dots[TILE_TOKENS]) {
    __m256i high[TILE_TOKENS];
    clear(n_tokens, dots);
    clear(n_tokens, high);
    UNROLL for (int v = 0; v < 8; v++) {
        __m256i merged = load(codes + v * VECTOR_NBYTES);
        add_word(n_tokens, masked(merged, 0x0f), x, 2 * v, dots);
        add_word(n_tokens, masked(merged, 0xf0), x, 2 * v + 1, high);
    }
    add_shifted(n_tokens, high, 4, dots);
}

/* 3 bits, three vectors for eight words: two words lie in the low six bits of each vector; the seventh and the eighth
 * have two bits at the top of the first and the second, and their third bit at the top of the third. */
INLINE void dot_3bit(int n_tokens, const uint8_t *codes, const uint8_t *x, __m256i dots[TILE_TOKENS]) {
    __m256i by_8[TILE_TOKENS], by_16[TILE_TOKENS], by_32[TILE_TOKENS];
    clear(n_tokens, dots);
    clear(n_tokens, by_8);
    clear(n_tokens, by_16);
    clear(n_tokens, by_32);
    UNROLL for (int half = 0; half < 2; half++) {
        const uint8_t *vectors = codes + 3 * half * VECTOR_NBYTES;
        __m256i merged[3] = {load(vectors), load(vectors + VECTOR_NBYTES), load(vectors + 2 * VECTOR_NBYTES)};
        UNROLL for (int v = 0; v < 3; v++) {
            add_word(n_tokens, masked(merged[v], 0x07), x, 8 * half + 2 * v, dots);
            add_word(n_tokens, masked(merged[v], 0x38), x, 8 * half + 2 * v + 1, by_8);
        }
        __m256i seventh = merged_by(_mm256_srli_epi16(merged[0], 2), 0x30, masked(merged[2], 0x40));
        __m256i eighth = merged_by(_mm256_srli_epi16(merged[1], 1), 0x60, masked(merged[2], 0x80));
        add_word(n_tokens, seventh, x, 8 * half + 6, by_16);
        add_word(n_tokens, eighth, x, 8 * half + 7, by_32);
    }
    add_shifted(n_tokens, by_8, 3, dots);
    add_shifted(n_tokens, by_16, 4, dots);
    add_shifted(n_tokens, by_32, 5, dots);
}

/* Add a block to the sums, for groups of 64 inputs. */
INLINE void add_block_g64(int n_tokens, const struct rows *rows, const uint8_t *metadata, const uint8_t *codes,
                          const uint8_t *x, int nbits, __m256 sums[TILE_TOKENS]) {
    __m256i dots[TILE_TOKENS];
    switch (nbits) {
    case 8:
        dot_8bit(n_tokens, codes, x, dots);
        break;
    case 4:
        dot_4bit(n_tokens, codes, x, dots);
        break;
    default:
        dot_3bit(n_tokens, codes, x, dots);
        break;
    }
    __m256 s = load_u8(metadata);
    __m256 base = _mm256_fmadd_ps(rows->base_step, load_u8(metadata + PANEL_ROWS), rows->base_min);
    UNROLL for (int token = 0; token < n_tokens; token++) {
        __m256 scale = _mm256_mul_ps(s, broadcast_float(x + scales_at(n_tokens) + 4 * token));
        __m256 sum = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[token]), sums[token]);
        sums[token] = _mm256_fmadd_ps(base, broadcast_float(x + scaled_sums_at(n_tokens) + 4 * token), sum);
    }
}

/* The dot products of one group of 16 inputs, the four words of one vector. */
INLINE void dot_2bit(int n_tokens, const uint8_t *codes, const uint8_t *x, int group, __m256i dots[TILE_TOKENS]) {
    __m256i merged = load(codes + group * VECTOR_NBYTES);
    clear(n_tokens, dots);
    UNROLL for (int word = 0; word < 4; word++) {
        __m256i shifted = word == 0 ? merged : _mm256_srli_epi16(merged, 2 * word);
        add_word(n_tokens, masked(shifted, 3), x, 4 * group + word, dots);
    }
}

/* Return a group's byte of each row. */
INLINE __m256i byte_of(__m256i bytes, int group) {
    __m256i shifted = group == 0 ? bytes : _mm256_srli_epi32(bytes, 8 * group);
    return group == 3 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi32(0xff));
}

/* Add a block of 2-bit codes to the sums: four groups of 16 inputs. A group's dot product stays below 2^15 and its scale
 * below 2^8: as pairs of 16 bits, the upper one of the scale 0, `vpdpwssd` multiplies them exactly. */
INLINE void add_block_g16(int n_tokens, const struct rows *rows, const uint8_t *metadata, const uint8_t *codes,
                          const uint8_t *x, __m256 sums[TILE_TOKENS]) {
    __m256i scales = load(metadata), bases = load(metadata + VECTOR_NBYTES), scaled_dots[TILE_TOKENS];
    clear(n_tokens, scaled_dots);
    UNROLL for (int group = 0; group < 4; group++) {
        __m256i dots[TILE_TOKENS], scale = byte_of(scales, group);
        dot_2bit(n_tokens, codes, x, group, dots);
        UNROLL for (int token = 0; token < n_tokens; token++) {
            scaled_dots[token] = _mm256_dpwssd_epi32(scaled_dots[token], scale, dots[token]);
        }
    }
    __m256i even = _mm256_and_si256(bases, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(bases, 8);
    UNROLL for (int token = 0; token < n_tokens; token++) {
        __m256i based = _mm256_madd_epi16(even, broadcast(x + even_at(n_tokens) + 4 * token));
        based = _mm256_dpwssd_epi32(based, odd, broadcast(x + odd_at(n_tokens) + 4 * token));
        __m256 dot = _mm256_fmadd_ps(rows->base_step, _mm256_cvtepi32_ps(based), _mm256_cvtepi32_ps(scaled_dots[token]));
        sums[token] = _mm256_fmadd_ps(dot, broadcast_float(x + scales_at(n_tokens) + 4 * token), sums[token]);
    }
}

INLINE struct rows rows_at(const struct plan *plan, int64_t panel) {
    return (struct rows){
        .scale_step = _mm256_loadu_ps(plan->scale_step + panel * PANEL_ROWS),
        .base_min = _mm256_loadu_ps(plan->base_min + panel * PANEL_ROWS),
        .base_step = _mm256_loadu_ps(plan->base_step + panel * PANEL_ROWS),
    };
}

/* Compute a panel for a tile; n_tokens and nbits are constants wherever this is inlined. */
INLINE void multiply_panel(int n_tokens, const struct plan *plan, int64_t panel, int nbits, const uint8_t *x,
                           int64_t y_offset, float *const y[TILE_TOKENS]) {
    struct rows rows = rows_at(plan, panel);
    prefetch_rows(plan, panel + 1);
    __m256 sums[TILE_TOKENS], scaled_sums[TILE_TOKENS];
    UNROLL for (int token = 0; token < n_tokens; token++) {
        sums[token] = scaled_sums[token] = _mm256_setzero_ps();
    }
    const uint8_t *metadata = plan->panels + panel * plan->panel_nbytes;
    for (int64_t first = 0; first < plan->n_blocks; first += blocks_per_stripe(nbits)) {
        const uint8_t *codes = metadata + STRIPE_METADATA_NBYTES, *next_stripe = metadata + stripe_nbytes(nbits);
        prefetch_lines(metadata + NBYTES_AHEAD, 1);
        int64_t n_blocks = plan->n_blocks - first;
        n_blocks = n_blocks < blocks_per_stripe(nbits) ? n_blocks : blocks_per_stripe(nbits);
        for (int64_t block = 0; block < n_blocks; block++) {
            prefetch_lines(codes + NBYTES_AHEAD, block_nbytes(nbits) / 64);
            if (nbits == 2) {
                add_block_g16(n_tokens, &rows, metadata, codes, x, sums);
                UNROLL for (int token = 0; token < n_tokens; token++) {
                    __m256 scaled_sum = broadcast_float(x + scaled_sums_at(n_tokens) + 4 * token);
                    scaled_sums[token] = _mm256_add_ps(scaled_sums[token], scaled_sum);
                }
            } else {
                add_block_g64(n_tokens, &rows, metadata, codes, x, nbits, sums);
            }
            metadata += metadata_nbytes(nbits);
            codes += block_nbytes(nbits);
            x += block_nbytes_of(n_tokens);
        }
        metadata = next_stripe;
    }
    UNROLL for (int token = 0; token < n_tokens; token++) {
        __m256 sum = nbits == 2 ? _mm256_fmadd_ps(rows.base_min, scaled_sums[token], sums[token]) : sums[token];
        store_rows(plan, panel, (f32x8)_mm256_mul_ps(rows.scale_step, sum), y[token] + y_offset);
    }
}

INLINE void multiply_panels(int n_tokens, const struct plan *plan, int64_t first_panel, int64_t n_panels, int nbits,
                            const uint8_t *blocks, float *const y[TILE_TOKENS]) {
    for (int64_t i = 0; i < n_panels; i++) {
        multiply_panel(n_tokens, plan, first_panel + i, nbits, blocks, i * PANEL_ROWS, y);
    }
}

INLINE void multiply_tile(const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile,
                          float *const y[TILE_TOKENS], int nbits) {
    switch (tile->n_tokens) {
    case 1:
        multiply_panels(1, plan, first_panel, n_panels, nbits, tile->blocks, y);
        break;
    case 2:
        multiply_panels(2, plan, first_panel, n_panels, nbits, tile->blocks, y);
        break;
    case 3:
        multiply_panels(3, plan, first_panel, n_panels, nbits, tile->blocks, y);
        break;
    default:
        multiply_panels(4, plan, first_panel, n_panels, nbits, tile->blocks, y);
        break;
    }
}

#define ARGUMENTS                                                                                                      \
    const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile, float *const y[TILE_TOKENS]

static void int8_8bit(ARGUMENTS) { multiply_tile(plan, first_panel, n_panels, tile, y, 8); }

static void int8_4bit(ARGUMENTS) { multiply_tile(plan, first_panel, n_panels, tile, y, 4); }

static void int8_3bit(ARGUMENTS) { multiply_tile(plan, first_panel, n_panels, tile, y, 3); }

static void int8_2bit(ARGUMENTS) { multiply_tile(plan, first_panel, n_panels, tile, y, 2); }

const struct kernels vnni_kernels = {
    .name = "vnni",
    .has_avx2 = true,
    .quantize = quantize_token_avx2,
    .int8 = {rows_bf16_avx2, rows_fp16_avx2, int8_8bit, int8_4bit, int8_3bit, int8_2bit},
    .exact = {rows_bf16_avx2, rows_fp16_avx2, exact_8bit, exact_4bit, exact_3bit, exact_2bit},
};
