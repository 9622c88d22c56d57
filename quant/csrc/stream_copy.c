/* An expert's bytes are read once from memory and written once to memory. Stores that go through the caches would read
 * the target's lines first, half as much again to move, and drive out what the computing threads have there. */

#include "stream_copy.h"

#include <string.h>

#if defined(__x86_64__)

#include <emmintrin.h>

enum {
    LINE = 64,
    AHEAD = 1024,        /* bytes, of reading before writing */
    SHORTEST = 16 * LINE /* below this the caches are as good a place */
};

static void stream_line(uint8_t *target, const uint8_t *source) {
    _mm_prefetch((const char *)source + AHEAD, _MM_HINT_T0); /* past the end too: a prefetch faults nowhere */
    __m128i parts[LINE / sizeof(__m128i)];
    memcpy(parts, source, LINE);
    for (size_t i = 0; i < LINE / sizeof(__m128i); i++) {
        _mm_stream_si128((__m128i *)target + i, parts[i]);
    }
}

void stream_copy(uint8_t *target, const uint8_t *source, int64_t nbytes) {
    if (nbytes < SHORTEST) {
        memcpy(target, source, (size_t)nbytes);
        return;
    }
    int64_t first = (int64_t)(-(uintptr_t)target % LINE); /* to where the target's lines begin */
    int64_t lines = (nbytes - first) / LINE * LINE;
    memcpy(target, source, (size_t)first);
    for (int64_t i = first; i < first + lines; i += LINE) {
        stream_line(target + i, source + i);
    }
    memcpy(target + first + lines, source + first + lines, (size_t)(nbytes - first - lines));
    _mm_sfence(); /* these stores are ordered by nothing else, not even by a release */
}

#else

void stream_copy(uint8_t *target, const uint8_t *source, int64_t nbytes) { memcpy(target, source, (size_t)nbytes); }

#endif
