/* Copies in order, by a thread of their own, each of which ends no sooner than behind a link of a stated speed: the copy
 * queue of the stand-in accelerator (runner/devices). Statuses are api.h's.
 *
 * Everything that is added has a place, counted from 1. Copies, holds: added by one thread at a time, never waiting for
 * the queue. Released, awaited and asked for by any thread. */

#ifndef EXPERTD_TIMED_COPIES_H
#define EXPERTD_TIMED_COPIES_H

#include "api.h"

struct expertd_copies;

EXPERTD_EXPORT int expertd_copies_start(struct expertd_copies **started);

/* Copy source[:nbytes] to target. On the modelled link that begins now or when what was added before ends, whichever is
 * later, and takes duration_ns; it is done when the bytes are there and that time is over. Both stay valid until then. */
EXPERTD_EXPORT int expertd_copies_add(struct expertd_copies *copies, uint8_t *target, const uint8_t *source,
                                      int64_t nbytes, int64_t duration_ns, int64_t *place);

/* Begin what is added from now on only when that number was released. */
EXPERTD_EXPORT int expertd_copies_hold(struct expertd_copies *copies, int64_t number, int64_t *place);

/* Release all numbers up to this one, for good. */
EXPERTD_EXPORT int expertd_copies_release(struct expertd_copies *copies, int64_t number);

/* Whether all up to that place is done. */
EXPERTD_EXPORT int expertd_copies_are_done(const struct expertd_copies *copies, int64_t place);

/* Return when all up to that place is done. */
EXPERTD_EXPORT int expertd_copies_await(struct expertd_copies *copies, int64_t place);

/* Copy nothing from now on: what was added is done as soon as it is not held. */
EXPERTD_EXPORT int expertd_copies_skip(struct expertd_copies *copies);

/* End the thread when all is done that was added; or, if it `gives_up`, before the next copy, whatever is held. Nobody
 * else uses the copies then. */
EXPERTD_EXPORT int expertd_copies_stop(struct expertd_copies *copies, int64_t gives_up);

#endif
