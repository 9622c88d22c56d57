/* How a thread waits for another one: awake for a moment, then asleep on a word until it is woken. */

#ifndef EXPERTD_WAITING_H
#define EXPERTD_WAITING_H

#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Sleep until woken, unless the word is no longer what was seen. Nobody is woken without a reason but by chance: whoever
 * waits looks again. */
static inline void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static inline void futex_wake(_Atomic uint32_t *word, int n) {
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

static inline int64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

/* Let about a microsecond pass, between two looks at what another thread writes. */
static inline void pause_briefly(void) {
    for (int i = 0; i < 32; i++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
    sched_yield(); /* several runners share a machine: whoever else wants this core has it */
}

#endif
