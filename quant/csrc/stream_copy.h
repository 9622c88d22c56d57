/* Copying bytes that the copying thread does not read again. */

#ifndef EXPERTD_STREAM_COPY_H
#define EXPERTD_STREAM_COPY_H

#include <stdint.h>

/* Copy source[:nbytes] to target, which do not overlap; past the caches where the processor can. Whoever sees what the
 * thread writes afterwards sees all of it. */
void stream_copy(uint8_t *target, const uint8_t *source, int64_t nbytes);

#endif
