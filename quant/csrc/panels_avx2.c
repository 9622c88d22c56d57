/* The int8 kernels in AVX2. One 32-byte vector of codes holds, in each 32-bit lane, codes of one row: `vpmaddubsw`
 * multiplies them with four broadcast activations and adds pairs, so rows never mix and no sum across lanes is needed.
 *
 * What makes them as fast as memory:
 *   - For one or two tokens two panels apart are walked at once (streams): more than one stream a core is faster on some
 *     processors (Zen 3), more than two are slower on others (Zen 4).
 *   - Each broadcast of activations serves all streams.
 *   - Sums of pairs stay in 16 bits as long as they cannot overflow, and are widened once a block or half a block.
 *   - What all streams read next is prefetched, and so are the three values of each row of the panels after these.
 *
 * Arrays below are registers: their lengths are constants wherever a function is inlined, and all loops unroll. */

#include "exact.h"
#include "loads_avx2.h"

enum { STREAMS_MAX = 2 };

/* A panel that is being walked, and what its rows share. */
struct stream {
    const uint8_t *stripes;
    __m256 base_min;
    __m256 base_step;
};

/* Where a block lies in its panel: the same place in every stream's. */
struct place {
    int64_t metadata;
    int64_t codes;
};

INLINE __m256i shifted(__m256i codes, int bits) { return bits == 0 ? codes : _mm256_srli_epi16(codes, bits); }

INLINE __m256i masked(__m256i codes, int bits, int mask) {
    return _mm256_and_si256(shifted(codes, bits), _mm256_set1_epi8((char)mask));
}

/* Multiply a word of codes of each stream with that word of each token, and add the pairs to 16-bit sums. */
INLINE void multiply_word(int n_streams, int n_tokens, const __m256i words[], const uint8_t *x, int word, int is_first,
                          __m256i pairs[STREAMS_MAX][TILE_TOKENS]) {
    UNROLL for (int token = 0; token < n_tokens; token++) {
        __m256i activations = broadcast(x + 4 * (word * n_tokens + token));
        UNROLL for (int stream = 0; stream < n_streams; stream++) {
            __m256i products = _mm256_maddubs_epi16(words[stream], activations);
            pairs[stream][token] = is_first ? products : _mm256_add_epi16(pairs[stream][token], products);
        }
    }
}

/* Widen sums of pairs to 32 bits, a row a lane. */
INLINE __m256i widened(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

/* 4 bits: 8 words of at most 2 * 15 * 127 a pair stay below 2^15, so half a block is added in 16 bits. */
INLINE void dot_4bit(int n_streams, int n_tokens, const struct stream streams[], int64_t codes, const uint8_t *x,
                     __m256i dots[STREAMS_MAX][TILE_TOKENS]) {
    UNROLL for (int half = 0; half < 2; half++) {
        __m256i pairs[STREAMS_MAX][TILE_TOKENS];
        UNROLL for (int v = 4 * half; v < 4 * half + 4; v++) {
            __m256i low[STREAMS_MAX], high[STREAMS_MAX];
            UNROLL for (int stream = 0; stream < n_streams; stream++) {
                __m256i merged = load(streams[stream].stripes + codes + v * VECTOR_NBYTES);
                low[stream] = masked(merged, 0, 15);
                high[stream] = masked(merged, 4, 15);
            }
            multiply_word(n_streams, n_tokens, low, x, 2 * v, v == 4 * half, pairs);
            multiply_word(n_streams, n_tokens, high, x, 2 * v + 1, 0, pairs);
        }
        UNROLL for (int stream = 0; stream < n_streams; stream++) {
            UNROLL for (int token = 0; token < n_tokens; token++) {
                __m256i dot = widened(pairs[stream][token]);
                dots[stream][token] = half == 0 ? dot : _mm256_add_epi32(dots[stream][token], dot);
            }
        }
    }
}

/* 3 bits: all 16 words of at most 2 * 7 * 127 a pair stay below 2^15. */
INLINE void dot_3bit(int n_streams, int n_tokens, const struct stream streams[], int64_t codes, const uint8_t *x,
                     __m256i dots[STREAMS_MAX][TILE_TOKENS]) {
    __m256i pairs[STREAMS_MAX][TILE_TOKENS];
    UNROLL for (int half = 0; half < 2; half++) {
        __m256i merged[3][STREAMS_MAX], words[STREAMS_MAX];
        UNROLL for (int v = 0; v < 3; v++) { /* two words lie in the low six bits of each vector */
            UNROLL for (int stream = 0; stream < n_streams; stream++) {
                merged[v][stream] = load(streams[stream].stripes + codes + (3 * half + v) * VECTOR_NBYTES);
                words[stream] = masked(merged[v][stream], 0, 7);
            }
            multiply_word(n_streams, n_tokens, words, x, 8 * half + 2 * v, half == 0 && v == 0, pairs);
            UNROLL for (int stream = 0; stream < n_streams; stream++) {
                words[stream] = masked(merged[v][stream], 3, 7);
            }
            multiply_word(n_streams, n_tokens, words, x, 8 * half + 2 * v + 1, 0, pairs);
        }
        UNROLL for (int w = 0; w < 2; w++) { /* the other two in the upper bits: 2 + 1 of each */
            UNROLL for (int stream = 0; stream < n_streams; stream++) {
                words[stream] = _mm256_or_si256(masked(merged[w][stream], 6, 3), masked(merged[2][stream], 4 + w, 4));
            }
            multiply_word(n_streams, n_tokens, words, x, 8 * half + 6 + w, 0, pairs);
        }
    }
    UNROLL for (int stream = 0; stream < n_streams; stream++) {
        UNROLL for (int token = 0; token < n_tokens; token++) {
            dots[stream][token] = widened(pairs[stream][token]);
        }
    }
}

/* 8 bits: a pair of products of u8 codes would overflow 16 bits. Codes less 128 are signed, and |q| times x with the
 * sign of q stays below 2^15, but leaves no room for a second one. */
INLINE void dot_8bit(int n_streams, int n_tokens, const struct stream streams[], int64_t codes, const uint8_t *x,
                     __m256i dots[STREAMS_MAX][TILE_TOKENS]) {
    UNROLL for (int word = 0; word < WORDS_PER_BLOCK; word++) {
        __m256i centered[STREAMS_MAX];
        UNROLL for (int stream = 0; stream < n_streams; stream++) {
            __m256i unsigned_codes = load(streams[stream].stripes + codes + word * VECTOR_NBYTES);
            centered[stream] = _mm256_xor_si256(unsigned_codes, _mm256_set1_epi8((char)0x80));
        }
        UNROLL for (int token = 0; token < n_tokens; token++) {
            __m256i activations = broadcast(x + 4 * (word * n_tokens + token));
            UNROLL for (int stream = 0; stream < n_streams; stream++) {
                __m256i signed_x = _mm256_sign_epi8(activations, centered[stream]);
                __m256i dot = widened(_mm256_maddubs_epi16(_mm256_abs_epi8(centered[stream]), signed_x));
                dots[stream][token] = word == 0 ? dot : _mm256_add_epi32(dots[stream][token], dot);
            }
        }
    }
}

/* Add a block to the sums, for groups of 64 inputs. */
INLINE void add_block_g64(int n_streams, int n_tokens, const struct stream streams[], struct place place,
                          const uint8_t *x, int nbits, __m256 sums[STREAMS_MAX][TILE_TOKENS]) {
    __m256i dots[STREAMS_MAX][TILE_TOKENS];
    switch (nbits) {
    case 8:
        dot_8bit(n_streams, n_tokens, streams, place.codes, x, dots);
        break;
    case 4:
        dot_4bit(n_streams, n_tokens, streams, place.codes, x, dots);
        break;
    default:
        dot_3bit(n_streams, n_tokens, streams, place.codes, x, dots);
        break;
    }
    UNROLL for (int stream = 0; stream < n_streams; stream++) {
        const uint8_t *metadata = streams[stream].stripes + place.metadata;
        __m256 s = load_u8(metadata);
        __m256 base = _mm256_fmadd_ps(streams[stream].base_step, load_u8(metadata + PANEL_ROWS), streams[stream].base_min);
        UNROLL for (int token = 0; token < n_tokens; token++) {
            __m256 scale = _mm256_mul_ps(s, broadcast_float(x + scales_at(n_tokens) + 4 * token));
            __m256 scaled_sum = broadcast_float(x + scaled_sums_at(n_tokens) + 4 * token);
            __m256 sum = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[stream][token]), sums[stream][token]);
            sums[stream][token] = _mm256_fmadd_ps(base, scaled_sum, sum);
        }
    }
}

/* The scales of one group of four, each as the two 16-bit factors that its row's sums of pairs are multiplied by. */
INLINE __m256i scales_of_group(__m256i scales, int group) {
    __m256i places = _mm256_setr_epi8(0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1, /**/
                                      0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1);
    __m256i step = _mm256_set1_epi16((short)group); /* only the low bytes are places */
    return _mm256_shuffle_epi8(scales, _mm256_add_epi16(places, step));
}

/* Multiply the four words of a group with one token's, and add the pairs. */
INLINE __m256i pairs_of_group(const __m256i words[4], const uint8_t *x, int group, int n_tokens, int token) {
    __m256i products[4];
    UNROLL for (int word = 0; word < 4; word++) {
        products[word] = _mm256_maddubs_epi16(words[word], broadcast(x + 4 * ((4 * group + word) * n_tokens + token)));
    }
    return _mm256_add_epi16(_mm256_add_epi16(products[0], products[1]), _mm256_add_epi16(products[2], products[3]));
}

/* Add a block of 2-bit codes to the sums: four groups of 16 inputs, one vector of codes each. Everything up to the block's
 * end is integer arithmetic; in 16-bit lanes a row's groups 0 and 2 lie side by side (even), and so do 1 and 3 (odd). */
INLINE void add_block_g16(int n_streams, int n_tokens, const struct stream streams[], struct place place,
                          const uint8_t *x, __m256 sums[STREAMS_MAX][TILE_TOKENS]) {
    __m256i scales[STREAMS_MAX], scaled_dots[STREAMS_MAX][TILE_TOKENS];
    UNROLL for (int stream = 0; stream < n_streams; stream++) {
        scales[stream] = load(streams[stream].stripes + place.metadata);
    }
    UNROLL for (int group = 0; group < 4; group++) {
        UNROLL for (int stream = 0; stream < n_streams; stream++) {
            __m256i merged = load(streams[stream].stripes + place.codes + group * VECTOR_NBYTES), words[4];
            __m256i factors = scales_of_group(scales[stream], group);
            UNROLL for (int word = 0; word < 4; word++) {
                words[word] = masked(merged, 2 * word, 3);
            }
            UNROLL for (int token = 0; token < n_tokens; token++) {
                __m256i scaled = _mm256_madd_epi16(pairs_of_group(words, x, group, n_tokens, token), factors);
                scaled_dots[stream][token] = group == 0 ? scaled : _mm256_add_epi32(scaled_dots[stream][token], scaled);
            }
        }
    }
    UNROLL for (int stream = 0; stream < n_streams; stream++) {
        __m256i bases = load(streams[stream].stripes + place.metadata + VECTOR_NBYTES);
        __m256i even = _mm256_and_si256(bases, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(bases, 8);
        UNROLL for (int token = 0; token < n_tokens; token++) {
            __m256i even_x = broadcast(x + even_at(n_tokens) + 4 * token);
            __m256i odd_x = broadcast(x + odd_at(n_tokens) + 4 * token);
            __m256i based = _mm256_add_epi32(_mm256_madd_epi16(even, even_x), _mm256_madd_epi16(odd, odd_x));
            __m256 dot = _mm256_fmadd_ps(streams[stream].base_step, _mm256_cvtepi32_ps(based),
                                         _mm256_cvtepi32_ps(scaled_dots[stream][token]));
            __m256 scale = broadcast_float(x + scales_at(n_tokens) + 4 * token);
            sums[stream][token] = _mm256_fmadd_ps(scale, dot, sums[stream][token]);
        }
    }
}

INLINE struct stream stream_at(const struct plan *plan, int64_t panel) {
    return (struct stream){
        .stripes = plan->panels + panel * plan->panel_nbytes,
        .base_min = _mm256_loadu_ps(plan->base_min + panel * PANEL_ROWS),
        .base_step = _mm256_loadu_ps(plan->base_step + panel * PANEL_ROWS),
    };
}

/* How far ahead of what is computed each stream is prefetched: far enough that memory has answered, near enough that what
 * came is still in the first-level cache. Measured. Behind a panel the next one follows, so this never has to jump. */
enum { NBYTES_AHEAD = 2048 };

INLINE void prefetch_streams(int n_streams, const struct stream streams[], int64_t at, int64_t n_lines) {
    UNROLL for (int stream = 0; stream < n_streams; stream++) {
        prefetch_lines(streams[stream].stripes + at, n_lines);
    }
}

/* Compute n_streams panels for a tile; both counts and nbits are constants wherever this is inlined. */
INLINE void multiply_streams(int n_streams, int n_tokens, const struct plan *plan, const int64_t panels[], int nbits,
                             const uint8_t *blocks, int64_t first_panel, float *const y[TILE_TOKENS]) {
    struct stream streams[STREAMS_MAX];
    __m256 sums[STREAMS_MAX][TILE_TOKENS], scaled_sums[TILE_TOKENS];
    UNROLL for (int stream = 0; stream < n_streams; stream++) {
        streams[stream] = stream_at(plan, panels[stream]);
        prefetch_rows(plan, panels[stream] + 1);
        UNROLL for (int token = 0; token < n_tokens; token++) {
            sums[stream][token] = _mm256_setzero_ps();
        }
    }
    UNROLL for (int token = 0; token < n_tokens; token++) {
        scaled_sums[token] = _mm256_setzero_ps();
    }
    const uint8_t *x = blocks;
    for (int64_t first = 0, stripe = 0; first < plan->n_blocks; first += blocks_per_stripe(nbits), stripe += stripe_nbytes(nbits)) {
        prefetch_streams(n_streams, streams, stripe + NBYTES_AHEAD, 1); /* of metadata, elsewhere of codes */
        struct place place = {stripe, stripe + STRIPE_METADATA_NBYTES};
        int64_t n_blocks = plan->n_blocks - first;
        n_blocks = n_blocks < blocks_per_stripe(nbits) ? n_blocks : blocks_per_stripe(nbits);
        for (int64_t block = 0; block < n_blocks; block++) {
            prefetch_streams(n_streams, streams, place.codes + NBYTES_AHEAD, block_nbytes(nbits) / 64);
            if (nbits == 2) {
                add_block_g16(n_streams, n_tokens, streams, place, x, sums);
                UNROLL for (int token = 0; token < n_tokens; token++) {
                    __m256 scaled_sum = broadcast_float(x + scaled_sums_at(n_tokens) + 4 * token);
                    scaled_sums[token] = _mm256_add_ps(scaled_sums[token], scaled_sum);
                }
            } else {
                add_block_g64(n_streams, n_tokens, streams, place, x, nbits, sums);
            }
            place.metadata += metadata_nbytes(nbits);
            place.codes += block_nbytes(nbits);
            x += block_nbytes_of(n_tokens);
        }
    }
    UNROLL for (int stream = 0; stream < n_streams; stream++) {
        __m256 scale_step = _mm256_loadu_ps(plan->scale_step + panels[stream] * PANEL_ROWS);
        UNROLL for (int token = 0; token < n_tokens; token++) {
            __m256 sum = sums[stream][token];
            if (nbits == 2) {
                sum = _mm256_fmadd_ps(streams[stream].base_min, scaled_sums[token], sum);
            }
            f32x8 rows = (f32x8)_mm256_mul_ps(scale_step, sum);
            store_rows(plan, panels[stream], rows, y[token] + (panels[stream] - first_panel) * PANEL_ROWS);
        }
    }
}

/* Walk a range of panels as n_streams ranges side by side; what is left over alone. */
INLINE void multiply_range(int n_streams, int n_tokens, const struct plan *plan, int64_t first_panel, int64_t n_panels,
                           int nbits, const uint8_t *blocks, float *const y[TILE_TOKENS]) {
    int64_t stride = n_panels / n_streams;
    for (int64_t i = 0; i < stride; i++) {
        int64_t panels[STREAMS_MAX];
        UNROLL for (int stream = 0; stream < n_streams; stream++) {
            panels[stream] = first_panel + stream * stride + i;
        }
        multiply_streams(n_streams, n_tokens, plan, panels, nbits, blocks, first_panel, y);
    }
    for (int64_t panel = first_panel + n_streams * stride; panel < first_panel + n_panels; panel++) {
        multiply_streams(1, n_tokens, plan, &panel, nbits, blocks, first_panel, y);
    }
}

INLINE void multiply_tile(const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile,
                          float *const y[TILE_TOKENS], int nbits) {
    switch (tile->n_tokens) {
    case 1:
        multiply_range(2, 1, plan, first_panel, n_panels, nbits, tile->blocks, y);
        break;
    case 2:
        multiply_range(2, 2, plan, first_panel, n_panels, nbits, tile->blocks, y);
        break;
    case 3: /* groups of 16 need registers for their metadata, and leave them for one stream only */
        multiply_range(nbits == 2 ? 1 : 2, 3, plan, first_panel, n_panels, nbits, tile->blocks, y);
        break;
    default:
        multiply_range(nbits == 2 ? 1 : 2, 4, plan, first_panel, n_panels, nbits, tile->blocks, y);
        break;
    }
}

#define ARGUMENTS                                                                                                      \
    const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile, float *const y[TILE_TOKENS]

static void int8_8bit(ARGUMENTS) { multiply_tile(plan, first_panel, n_panels, tile, y, 8); }

static void int8_4bit(ARGUMENTS) { multiply_tile(plan, first_panel, n_panels, tile, y, 4); }

static void int8_3bit(ARGUMENTS) { multiply_tile(plan, first_panel, n_panels, tile, y, 3); }

static void int8_2bit(ARGUMENTS) { multiply_tile(plan, first_panel, n_panels, tile, y, 2); }

const struct kernels avx2_kernels = {
    .name = "avx2",
    .has_avx2 = true,
    .quantize = quantize_token_avx2,
    .int8 = {rows_bf16_avx2, rows_fp16_avx2, int8_8bit, int8_4bit, int8_3bit, int8_2bit},
    .exact = {rows_bf16_avx2, rows_fp16_avx2, exact_8bit, exact_4bit, exact_3bit, exact_2bit},
};
