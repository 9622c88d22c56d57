// Reads memory as fast as it comes, in one or several streams at once: what a kernel that only waits for its weights
// could reach. Nothing is computed but a sum that keeps the compiler from leaving the reads out.
//
// A core follows a handful of sequential streams by itself and has more requests under way with several than with one.
// Each stream takes 256 bytes, four cache lines, then it is the next one's turn. Plain GNU vectors: with AVX2 a load is
// 32 bytes, elsewhere the compiler makes two of 16.

#include <stddef.h>
#include <stdint.h>

typedef uint64_t vector __attribute__((vector_size(32), may_alias, aligned(8)));

enum { VECTORS_PER_TURN = 8, TURN_NBYTES = VECTORS_PER_TURN * sizeof(vector), STREAMS_MAX = 8 };

// Inlined with a constant number of streams, so that their loop is unrolled.
static inline __attribute__((always_inline)) uint64_t read_streams(const uint8_t *bytes, size_t stream_nbytes,
                                                                   int n_streams)
{
    vector sums[VECTORS_PER_TURN] = {{0}};
    for (size_t at = 0; at < stream_nbytes; at += TURN_NBYTES) {
        for (int stream = 0; stream < n_streams; stream++) {
            const vector *turn = (const vector *)(bytes + (size_t)stream * stream_nbytes + at);
            for (int i = 0; i < VECTORS_PER_TURN; i++)
                sums[i] += turn[i];
        }
    }
    vector sum = {0};
    for (int i = 0; i < VECTORS_PER_TURN; i++)
        sum += sums[i];
    return sum[0] + sum[1] + sum[2] + sum[3];
}

// How much shorter a stream is than its share: streams that begin a power of two apart would meet in the same sets of
// the caches and the same banks of memory. Also what a rest of less than a turn costs at most.
enum { STAGGER_NBYTES = 37 * TURN_NBYTES };

// The bytes that read_memory reads of so many.
size_t read_nbytes(size_t nbytes, int n_streams)
{
    size_t share = nbytes / (size_t)n_streams / TURN_NBYTES * TURN_NBYTES;
    return share > STAGGER_NBYTES ? (share - STAGGER_NBYTES) * (size_t)n_streams : 0;
}

// Reads what read_nbytes says, from a multiple of 8 on; returns the sum of its words, or 0 for a number of streams
// other than 1, 2, 4 and 8.
uint64_t read_memory(const uint8_t *bytes, size_t nbytes, int n_streams)
{
    if (n_streams <= 0 || n_streams > STREAMS_MAX)
        return 0;
    size_t stream_nbytes = read_nbytes(nbytes, n_streams) / (size_t)n_streams;
    switch (n_streams) {
    case 1: return read_streams(bytes, stream_nbytes, 1);
    case 2: return read_streams(bytes, stream_nbytes, 2);
    case 4: return read_streams(bytes, stream_nbytes, 4);
    case 8: return read_streams(bytes, stream_nbytes, 8);
    default: return 0;
    }
}

// Reads one of n_shares equal shares of every range, one range after another, in two streams; returns the sum of the
// words. Less than n_shares * 2 * TURN_NBYTES bytes of a range stay unread.
uint64_t read_shares(const uint8_t *const *ranges, const size_t *nbytes, size_t n_ranges, size_t share, size_t n_shares)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n_ranges; i++) {
        size_t stream_nbytes = nbytes[i] / n_shares / (2 * TURN_NBYTES) * TURN_NBYTES;
        sum += read_streams(ranges[i] + share * 2 * stream_nbytes, stream_nbytes, 2);
    }
    return sum;
}
