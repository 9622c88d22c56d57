/* Eight lanes of 32 bits, in the vector extension of gcc and clang: one AVX2 register, two SSE or NEON ones. The code
 * is the same for all; the compiler makes a second copy for AVX2 (DISPATCHED), and the loader picks one at start. */

#ifndef EXPERTD_VECTORS_H
#define EXPERTD_VECTORS_H

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "records are little endian, and are read in place"
#endif

#define LANES 8

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

#ifdef EXPERTD_HAS_TARGET_CLONES
#define DISPATCHED __attribute__((target_clones("avx2", "default")))
#else
#define DISPATCHED
#endif

/* Inlined by force: only so does a function become part of the AVX2 copy of its caller. */
#define INLINE static inline __attribute__((always_inline))

/* Through memcpy, since the address is aligned to 4 bytes only; it compiles to one unaligned load. */
INLINE u32x8 load_u32(const void *at) {
    u32x8 v;
    memcpy(&v, at, sizeof v);
    return v;
}

INLINE f32x8 load_f32(const float *at) {
    f32x8 v;
    memcpy(&v, at, sizeof v);
    return v;
}

INLINE void store_f32(float *at, f32x8 v) { memcpy(at, &v, sizeof v); }

/* Values below 2^31: as signed they convert in one instruction. */
INLINE f32x8 to_f32(u32x8 v) { return __builtin_convertvector((i32x8)v, f32x8); }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE /* gcc before 12 */
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32x8){__VA_ARGS__})
#endif

/* Transpose 8 x 8 in place: exchange the off-diagonal quarters of 2 x 2 tiles of single lanes, of pairs, of fours. */
INLINE void transpose(f32x8 m[LANES]) {
    for (int i = 0; i < LANES; i += 2) {
        f32x8 a = m[i], b = m[i + 1];
        m[i] = SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
        m[i + 1] = SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int n = 0; n < LANES / 2; n++) {
        int i = n + (n & 2); /* 0, 1, 4, 5 */
        f32x8 a = m[i], b = m[i + 2];
        m[i] = SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
        m[i + 2] = SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < LANES / 2; i++) {
        f32x8 a = m[i], b = m[i + 4];
        m[i] = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
        m[i + 4] = SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* In a fixed order, so that results do not depend on the instruction set. */
INLINE float sum_of_lanes(f32x8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

#endif
