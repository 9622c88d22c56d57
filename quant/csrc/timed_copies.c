#define _GNU_SOURCE /* syscall, prctl */

#include "timed_copies.h"

#include "part.h"
#include "stream_copy.h"
#include "waiting.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/prctl.h>

/* Waking a sleeping thread takes 50 us and more, a third of what copying a small expert takes. So whoever waits stays
 * awake for a moment, the thread about as long as a small model's layer takes, and gives its core up to others meanwhile
 * (pause_briefly); and the end of a copy is foreseen by so much, for its own thread and for those who sleep until then. */
static const int64_t idle_awake_ns = 1000 * 1000;
static const int64_t host_awake_ns = 200 * 1000;
static const int64_t woken_late_ns = 80 * 1000;

static const unsigned long timer_slack_ns = 1000; /* the kernel's own is 50 us */

enum kind { COPY, HOLD, END };

/* One of a chain of all that was added and is not done, behind the one that was done last. */
struct operation {
    struct operation *next;
    enum kind kind;
    int64_t added_ns;
    uint8_t *target;
    const uint8_t *source;
    int64_t nbytes;
    int64_t duration_ns;
    int64_t number; /* of a hold */
};

/* A number that grows, and how many sleep until it has. */
struct progress {
    _Atomic int64_t reached;
    _Atomic uint32_t word; /* its low half, which can be slept on */
    _Atomic uint32_t n_asleep;
};

struct expertd_copies {
    struct progress added;
    struct progress done;
    struct progress released;
    _Atomic int64_t released_ns; /* when the latest number was */
    _Atomic bool is_skipping;
    struct operation *last; /* of whoever adds */
    struct operation *done_last; /* of the thread */
    int64_t free_ns; /* until when the modelled link is occupied; of the thread */
    pid_t pid; /* threads do not survive a fork */
    pthread_t thread;
};

/* Called by one thread at a time. */
static void advance(struct progress *progress, int64_t reached) {
    atomic_store(&progress->reached, reached);
    atomic_store(&progress->word, (uint32_t)reached);
    /* A sleeper is counted before it looks again: either it sees the number, or it is seen here. */
    if (atomic_load(&progress->n_asleep) > 0) {
        futex_wake(&progress->word, INT32_MAX);
    }
}

static void await(struct progress *progress, int64_t reached, int64_t awake_ns) {
    int64_t until_ns = monotonic_ns() + awake_ns;
    while (atomic_load(&progress->reached) < reached) {
        if (monotonic_ns() < until_ns) {
            pause_briefly();
            continue;
        }
        atomic_fetch_add(&progress->n_asleep, 1);
        uint32_t seen = atomic_load(&progress->word);
        if (atomic_load(&progress->reached) < reached) {
            futex_wait(&progress->word, seen);
        }
        atomic_fetch_sub(&progress->n_asleep, 1);
        until_ns = monotonic_ns() + awake_ns; /* it was reached, or is about to be */
    }
}

static void await_end(struct expertd_copies *copies, int64_t end_ns) {
    if (end_ns - monotonic_ns() > 2 * woken_late_ns) {
        int64_t early_ns = end_ns - woken_late_ns;
        struct timespec until = {early_ns / 1000000000, early_ns % 1000000000};
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) != 0) {
            /* a signal's handler ran */
        }
        if (atomic_load(&copies->done.n_asleep) > 0) {
            futex_wake(&copies->done.word, INT32_MAX);
        }
    }
    while (monotonic_ns() < end_ns) {
        pause_briefly();
    }
}

/* Copy, and wait out the rest of what that takes on the link. Its times are those of the model: a copy that was seen to
 * end late does not delay the one behind it. */
static void copy(struct expertd_copies *copies, const struct operation *operation) {
    if (atomic_load(&copies->is_skipping)) {
        return;
    }
    stream_copy(operation->target, operation->source, operation->nbytes);
    if (operation->duration_ns > 0) {
        int64_t start_ns = operation->added_ns > copies->free_ns ? operation->added_ns : copies->free_ns;
        copies->free_ns = start_ns + operation->duration_ns;
        await_end(copies, copies->free_ns);
    }
}

/* Wait for the release, before which nothing starts on the link either. */
static void hold(struct expertd_copies *copies, const struct operation *operation) {
    await(&copies->released, operation->number, idle_awake_ns);
    int64_t released_ns = atomic_load(&copies->released_ns);
    copies->free_ns = released_ns > copies->free_ns ? released_ns : copies->free_ns;
}

static void *run_thread(void *argument) {
    struct expertd_copies *copies = argument;
    prctl(PR_SET_TIMERSLACK, timer_slack_ns, 0, 0, 0);
    for (int64_t place = 1;; place++) {
        await(&copies->added, place, idle_awake_ns);
        struct operation *operation = copies->done_last->next;
        free(copies->done_last);
        copies->done_last = operation;
        if (operation->kind == END) {
            return NULL;
        }
        (operation->kind == COPY ? copy : hold)(copies, operation);
        advance(&copies->done, place);
    }
}

static int add(struct expertd_copies *copies, struct operation operation, int64_t *place) {
    struct operation *added = malloc(sizeof *added);
    if (added == NULL) {
        return EXPERTD_NO_MEMORY;
    }
    operation.added_ns = monotonic_ns();
    *added = operation;
    copies->last->next = added;
    copies->last = added;
    *place = atomic_load(&copies->added.reached) + 1;
    advance(&copies->added, *place);
    return EXPERTD_OK;
}

static int check(const struct expertd_copies *copies) {
    if (copies == NULL) {
        return EXPERTD_NO_COPIES;
    }
    return copies->pid == getpid() ? EXPERTD_OK : EXPERTD_FORKED;
}

/* Start the thread; return whether it could be. Signals are the caller's: this thread takes none. */
static bool start_thread(struct expertd_copies *copies) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool is_started = pthread_create(&copies->thread, NULL, run_thread, copies) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return is_started;
}

int expertd_copies_start(struct expertd_copies **started) {
    if (started == NULL) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    struct expertd_copies *copies = calloc(1, sizeof *copies);
    struct operation *none = calloc(1, sizeof *none);
    if (copies != NULL && none != NULL) {
        copies->pid = getpid();
        copies->last = copies->done_last = none;
        if (start_thread(copies)) {
            *started = copies;
            return EXPERTD_OK;
        }
    }
    free(none);
    free(copies);
    return EXPERTD_NO_MEMORY;
}

int expertd_copies_add(struct expertd_copies *copies, uint8_t *target, const uint8_t *source, int64_t nbytes,
                       int64_t duration_ns, int64_t *place) {
    if (target == NULL || source == NULL || !is_aligned_to(8, place)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    if (nbytes < 1 || duration_ns < 0) {
        return EXPERTD_BAD_LENGTH;
    }
    int status = check(copies);
    struct operation operation = {
        .kind = COPY, .target = target, .source = source, .nbytes = nbytes, .duration_ns = duration_ns};
    return status == EXPERTD_OK ? add(copies, operation, place) : status;
}

int expertd_copies_hold(struct expertd_copies *copies, int64_t number, int64_t *place) {
    if (!is_aligned_to(8, place)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    int status = check(copies);
    return status == EXPERTD_OK ? add(copies, (struct operation){.kind = HOLD, .number = number}, place) : status;
}

int expertd_copies_release(struct expertd_copies *copies, int64_t number) {
    int status = check(copies);
    if (status == EXPERTD_OK) {
        atomic_store(&copies->released_ns, monotonic_ns());
        advance(&copies->released, number);
    }
    return status;
}

int expertd_copies_are_done(const struct expertd_copies *copies, int64_t place) {
    return copies != NULL && atomic_load(&copies->done.reached) >= place;
}

int expertd_copies_await(struct expertd_copies *copies, int64_t place) {
    int status = check(copies);
    if (status == EXPERTD_OK) {
        await(&copies->done, place, host_awake_ns);
    }
    return status;
}

int expertd_copies_skip(struct expertd_copies *copies) {
    int status = check(copies);
    if (status == EXPERTD_OK) {
        atomic_store(&copies->is_skipping, true);
    }
    return status;
}

int expertd_copies_stop(struct expertd_copies *copies, int64_t gives_up) {
    int status = check(copies);
    if (status == EXPERTD_NO_COPIES) {
        return status;
    }
    if (status == EXPERTD_OK) {
        if (gives_up) {
            atomic_store(&copies->is_skipping, true);
            expertd_copies_release(copies, INT64_MAX);
        }
        int64_t end;
        status = add(copies, (struct operation){.kind = END}, &end);
        if (status != EXPERTD_OK) {
            return status;
        }
        pthread_join(copies->thread, NULL);
        free(copies->last);
    } /* else a forked child, which has no thread and leaves the chain */
    free(copies);
    return EXPERTD_OK;
}
