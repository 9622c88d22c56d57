/* The threads of one runner and the memory they reuse. One call at a time: whoever calls the library owns the workspace
 * until the call returns; its threads run nothing but what that call shares out.
 *
 * Work is shared as numbered items that are taken one by one, so that a thread which the system does not run costs the
 * others nothing: they take what it would have taken. Which thread computes an item never changes the item's result. */

#ifndef EXPERTD_WORKSPACE_H
#define EXPERTD_WORKSPACE_H

#include <stdint.h>

#include "api.h"

/* Computes one item; called by any thread, several at once. */
typedef void item_function(void *context, int64_t item);

/* Compute items 0 … n_items - 1 on all threads that have time; return when all are done. */
void share_out(struct expertd_workspace *workspace, item_function *compute, void *context, int64_t n_items);

/* Return how many threads share the work, the caller's among them. */
int64_t n_threads_of(const struct expertd_workspace *workspace);

/* What one call keeps in the workspace's memory; `slot` counts from 0. Memory of one slot stays valid and unmoved until
 * the same slot is asked for again. Aligned to 64 bytes, of any content; NULL if the system has no more. */
enum { SCRATCH_SLOTS = 4 };
void *scratch(struct expertd_workspace *workspace, int slot, int64_t nbytes);

/* Count the time since `start_ns`, of now_ns(), as spent in products. Called by who entered the workspace. */
int64_t now_ns(void);
void count_products(struct expertd_workspace *workspace, int64_t start_ns);

/* Return EXPERTD_OK if this call may use the workspace now, and take it; every enter() has its leave(). */
int enter(struct expertd_workspace *workspace);
void leave(struct expertd_workspace *workspace);

#endif
