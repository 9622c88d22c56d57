/* The int8 kernels for any instruction set: GNU vectors, eight rows a vector. Slower than intrinsics, the same bits. */

#include <math.h>

#include "exact.h"
#include "unpack.h"

INLINE f32x8 fma_lanes(f32x8 a, f32x8 b, f32x8 c) {
    for (int lane = 0; lane < LANES; lane++) {
        c[lane] = fmaf(a[lane], b[lane], c[lane]);
    }
    return c;
}

INLINE f32x8 to_f32_signed(i32x8 v) { return __builtin_convertvector(v, f32x8); }

INLINE float float_at(const uint8_t *at) {
    float value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* Return the dot products of `n_words` words of codes, less `center`, with one token's codes. */
INLINE i32x8 dot_of(const u32x8 *words, const uint8_t *x, int n_tokens, int first_word, int n_words, int center) {
    i32x8 dot = {0};
    for (int word = first_word; word < first_word + n_words; word++) {
        for (int byte = 0; byte < 4; byte++) {
            int32_t q = (int8_t)x[4 * word * n_tokens + byte];
            dot += ((i32x8)(words[word] >> (8 * byte) & 0xff) - center) * q;
        }
    }
    return dot;
}

INLINE f32x8 add_block_g64(const struct panel *panel, const uint8_t *metadata, const u32x8 words[WORDS],
                           const uint8_t *block, int n_tokens, int token, int center, f32x8 sum) {
    float scale = float_at(block + scales_at(n_tokens) + 4 * token);
    float scaled_sum = float_at(block + scaled_sums_at(n_tokens) + 4 * token);
    f32x8 base = fma_lanes(panel->base_step, group_bytes(metadata + PANEL_ROWS, 1, 0), panel->base_min);
    i32x8 dot = dot_of(words, block + 4 * token, n_tokens, 0, WORDS, center);
    sum = fma_lanes(group_bytes(metadata, 1, 0) * scale, to_f32_signed(dot), sum);
    return fma_lanes(base, (f32x8){0} + scaled_sum, sum);
}

INLINE f32x8 add_block_g16(const struct panel *panel, const uint8_t *metadata, const u32x8 words[WORDS],
                           const uint8_t *block, int n_tokens, int token, f32x8 sum) {
    u32x8 scales = load_u32(metadata), bases = load_u32(metadata + 4 * PANEL_ROWS);
    i32x8 a = {0}, c = {0};
    for (int group = 0; group < 4; group++) {
        int16_t sum_q;
        int at = (group % 2 ? odd_at(n_tokens) : even_at(n_tokens)) + 4 * token + 2 * (group / 2);
        memcpy(&sum_q, block + at, sizeof sum_q);
        a += (i32x8)(scales >> (8 * group) & 0xff) * dot_of(words, block + 4 * token, n_tokens, 4 * group, 4, 0);
        c += (i32x8)(bases >> (8 * group) & 0xff) * (int32_t)sum_q;
    }
    float scale = float_at(block + scales_at(n_tokens) + 4 * token);
    f32x8 dot = fma_lanes(panel->base_step, to_f32_signed(c), to_f32_signed(a));
    return fma_lanes((f32x8){0} + scale, dot, sum);
}

INLINE void multiply_panels(const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile,
                            float *const y[TILE_TOKENS], int nbits) {
    int n_tokens = tile->n_tokens;
    for (int64_t index = first_panel; index < first_panel + n_panels; index++) {
        struct panel panel = panel_at(plan, index);
        f32x8 sum[TILE_TOKENS] = {{0}};
        float scaled_sum[TILE_TOKENS] = {0};
        for (int64_t block = 0; block < plan->n_blocks; block++) {
            const uint8_t *x = tile->blocks + block * block_nbytes_of(n_tokens);
            const uint8_t *metadata = metadata_of(&panel, block, nbits);
            u32x8 words[WORDS];
            split_words(codes_of(&panel, block, nbits), nbits, words);
            for (int token = 0; token < n_tokens; token++) {
                if (nbits == 2) {
                    sum[token] = add_block_g16(&panel, metadata, words, x, n_tokens, token, sum[token]);
                    scaled_sum[token] += float_at(x + scaled_sums_at(n_tokens) + 4 * token);
                } else {
                    sum[token] = add_block_g64(&panel, metadata, words, x, n_tokens, token, center_of(nbits), sum[token]);
                }
            }
        }
        for (int token = 0; token < n_tokens; token++) {
            if (nbits == 2) {
                sum[token] = fma_lanes(panel.base_min, (f32x8){0} + scaled_sum[token], sum[token]);
            }
            store_rows(plan, index, panel.scale_step * sum[token], y[token] + (index - first_panel) * PANEL_ROWS);
        }
    }
}

/* One function a format: inside it nbits is a constant. */
#define ARGUMENTS                                                                                                      \
    const struct plan *plan, int64_t first_panel, int64_t n_panels, const struct tile *tile, float *const y[TILE_TOKENS]

static void int8_8bit(ARGUMENTS) { multiply_panels(plan, first_panel, n_panels, tile, y, 8); }

static void int8_4bit(ARGUMENTS) { multiply_panels(plan, first_panel, n_panels, tile, y, 4); }

static void int8_3bit(ARGUMENTS) { multiply_panels(plan, first_panel, n_panels, tile, y, 3); }

static void int8_2bit(ARGUMENTS) { multiply_panels(plan, first_panel, n_panels, tile, y, 2); }

const struct kernels portable_kernels = {
    .name = "portable",
    .quantize = quantize_token_portable,
    .int8 = {exact_bf16, exact_fp16, int8_8bit, int8_4bit, int8_3bit, int8_2bit},
    .exact = {exact_bf16, exact_fp16, exact_8bit, exact_4bit, exact_3bit, exact_2bit},
};
