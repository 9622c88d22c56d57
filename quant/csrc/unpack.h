/* One block of a panel, 64 inputs of 8 rows, from bytes to float weights. Lane r of every vector is row r.
 *
 * A *word* is a lane of four codes, one a byte, of four neighbouring inputs; a block has 16 words a row. Widths below 8
 * bits differ only in how words are merged in memory. As no width carries a bit across a byte, shifts and masks of
 * whole words take all four codes apart at once. */

#ifndef EXPERTD_UNPACK_H
#define EXPERTD_UNPACK_H

#include "part.h"
#include "vectors.h"

enum { WORDS = BLOCK_COLS / 4 };

INLINE void split_8bit(const uint8_t *codes, u32x8 words[WORDS]) {
    for (int v = 0; v < WORDS; v++) {
        words[v] = load_u32(codes + 32 * v);
    }
}

INLINE void split_4bit(const uint8_t *codes, u32x8 words[WORDS]) {
    for (int v = 0; v < 8; v++) {
        u32x8 merged = load_u32(codes + 32 * v);
        words[2 * v] = merged & 0x0f0f0f0f;
        words[2 * v + 1] = merged >> 4 & 0x0f0f0f0f;
    }
}

/* Three vectors hold eight words: six in places of 3 bits; the bits of the last two lie where 2 bits were left. */
INLINE void split_3bit(const uint8_t *codes, u32x8 words[WORDS]) {
    for (int half = 0; half < 2; half++) {
        u32x8 *c = words + 8 * half;
        u32x8 m0 = load_u32(codes + 32 * (3 * half));
        u32x8 m1 = load_u32(codes + 32 * (3 * half + 1));
        u32x8 m2 = load_u32(codes + 32 * (3 * half + 2));
        c[0] = m0 & 0x07070707;
        c[1] = m0 >> 3 & 0x07070707;
        c[2] = m1 & 0x07070707;
        c[3] = m1 >> 3 & 0x07070707;
        c[4] = m2 & 0x07070707;
        c[5] = m2 >> 3 & 0x07070707;
        c[6] = (m0 >> 6 & 0x03030303) | (m2 >> 4 & 0x04040404);
        c[7] = (m1 >> 6 & 0x03030303) | (m2 >> 5 & 0x04040404);
    }
}

INLINE void split_2bit(const uint8_t *codes, u32x8 words[WORDS]) {
    for (int v = 0; v < 4; v++) {
        u32x8 merged = load_u32(codes + 32 * v);
        for (int i = 0; i < 4; i++) {
            words[4 * v + i] = merged >> (2 * i) & 0x03030303;
        }
    }
}

/* Take a block's codes apart; `nbits` is a constant wherever this is inlined. */
INLINE void split_words(const uint8_t *codes, int nbits, u32x8 words[WORDS]) {
    switch (nbits) {
    case 8:
        split_8bit(codes, words);
        break;
    case 4:
        split_4bit(codes, words);
        break;
    case 3:
        split_3bit(codes, words);
        break;
    default:
        split_2bit(codes, words);
        break;
    }
}

/* One panel, and what its eight rows share. */
struct panel {
    const uint8_t *stripes;
    f32x8 scale_step;
    f32x8 base_min;
    f32x8 base_step;
};

INLINE struct panel panel_at(const struct plan *plan, int64_t index) {
    return (struct panel){
        .stripes = plan->panels + index * plan->panel_nbytes,
        /* Row planes are padded to whole panels. */
        .scale_step = load_f32(plan->scale_step + index * PANEL_ROWS),
        .base_min = load_f32(plan->base_min + index * PANEL_ROWS),
        .base_step = load_f32(plan->base_step + index * PANEL_ROWS),
    };
}

/* Where the metadata and the codes of a block lie. */
INLINE const uint8_t *metadata_of(const struct panel *panel, int64_t block, int nbits) {
    int64_t stripe = block / blocks_per_stripe(nbits), place = block % blocks_per_stripe(nbits);
    return panel->stripes + stripe * stripe_nbytes(nbits) + place * metadata_nbytes(nbits);
}

INLINE const uint8_t *codes_of(const struct panel *panel, int64_t block, int nbits) {
    int64_t stripe = block / blocks_per_stripe(nbits);
    return panel->stripes + (stripe + 1) * STRIPE_METADATA_NBYTES + block * block_nbytes(nbits);
}

/* Return the bytes of one group, a row a lane; `groups` is a constant wherever this is inlined. */
INLINE f32x8 group_bytes(const uint8_t *bytes, int64_t groups, int group) {
    u32x8 v;
    if (groups == 4) {
        v = load_u32(bytes) >> (8 * group) & 0xff; /* a row's four groups are the bytes of its lane */
    } else {
        for (int row = 0; row < PANEL_ROWS; row++) {
            v[row] = bytes[row];
        }
    }
    return to_f32(v);
}

/* Expand a block of a panel: weights[k] holds input k of the block, in units of the rows' scale_step. `nbits` is a
 * constant wherever this is inlined. Each operation rounds by itself, as in quant/reference.py (the library is built
 * without contraction to fused operations). */
INLINE void unpack_block(const struct panel *panel, int64_t block, int nbits, f32x8 weights[BLOCK_COLS]) {
    const int64_t groups = groups_per_block(nbits);
    const uint8_t *metadata = metadata_of(panel, block, nbits);
    u32x8 words[WORDS];
    split_words(codes_of(panel, block, nbits), nbits, words);
    for (int group = 0; group < groups; group++) {
        f32x8 s = group_bytes(metadata, groups, group);
        f32x8 base = panel->base_min + panel->base_step * group_bytes(metadata + PANEL_ROWS * groups, groups, group);
        for (int64_t word = group * WORDS / groups; word < (group + 1) * WORDS / groups; word++) {
            for (int byte = 0; byte < 4; byte++) {
                f32x8 q = to_f32(words[word] >> (8 * byte) & 0xff) - (float)center_of(nbits);
                weights[4 * word + byte] = s * q + base;
            }
        }
    }
}

#endif
