#define _GNU_SOURCE /* syscall */

#include "workspace.h"

#include "part.h"
#include "waiting.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

/* Waking a sleeping thread takes 100 to 300 us, so one that may be needed again at once stays awake for so long. */
static const int64_t spin_ns = 100 * 1000;

enum {
    THREADS_MAX = 1024,
    CACHE_LINE = 64,
    JOB_ITEMS_MAX = (1 << 16) - 1, /* what fits in a ticket */
};

/* What is to be done, in one word, so that taking an item is one compare-and-exchange: the number of the job, how many
 * items it has, and the next that nobody took. A thread that looked away while a job ended cannot take an item of the
 * next one by mistake: the job's number is part of what it compares. */
typedef uint64_t ticket;

static ticket make_ticket(uint32_t job, int64_t n_items) { return (ticket)job << 32 | (ticket)n_items << 16; }
static int64_t n_items_of(ticket t) { return (int64_t)(t >> 16 & 0xffff); }
static int64_t next_of(ticket t) { return (int64_t)(t & 0xffff); }

struct memory {
    void *bytes;
    int64_t nbytes;
};

struct expertd_workspace {
    _Alignas(CACHE_LINE) _Atomic ticket ticket;
    _Alignas(CACHE_LINE) _Atomic uint32_t n_done; /* items of this job; the caller sleeps on it */
    _Alignas(CACHE_LINE) _Atomic uint32_t job;    /* its number; the others sleep on it */
    _Atomic uint32_t n_asleep;                    /* how many of the others do, or are about to */
    _Atomic bool is_caller_asleep;
    _Atomic bool stays_awake;
    _Atomic bool is_ending;
    _Atomic bool is_entered;
    item_function *compute; /* of the job that the ticket names; read only by who took an item of it */
    void *context;
    int64_t first_item;
    int64_t products_ns;
    pid_t pid; /* threads do not survive a fork */
    int64_t n_others;
    pthread_t *others;
    struct memory memory[SCRATCH_SLOTS];
};

int64_t now_ns(void) { return monotonic_ns(); }

/* Take items and compute them until none is left. */
static void take_items(struct expertd_workspace *workspace) {
    ticket seen = atomic_load(&workspace->ticket);
    while (next_of(seen) < n_items_of(seen)) {
        if (!atomic_compare_exchange_weak(&workspace->ticket, &seen, seen + 1)) {
            continue; /* seen is what is there now */
        }
        workspace->compute(workspace->context, workspace->first_item + next_of(seen));
        uint32_t n_done = atomic_fetch_add(&workspace->n_done, 1) + 1;
        if (n_done == n_items_of(seen) && atomic_load(&workspace->is_caller_asleep)) {
            futex_wake(&workspace->n_done, 1);
        }
        seen = atomic_load(&workspace->ticket);
    }
}

/* Return once the job's number is another than `seen`, asleep if that takes long. */
static void await_job(struct expertd_workspace *workspace, uint32_t seen) {
    int64_t end = now_ns() + spin_ns;
    while (atomic_load(&workspace->stays_awake) && now_ns() < end) {
        if (atomic_load(&workspace->job) != seen) {
            return;
        }
        pause_briefly();
    }
    /* Counted before it looks again: either it sees the new job, or the caller sees that somebody must be woken. */
    atomic_fetch_add(&workspace->n_asleep, 1);
    while (atomic_load(&workspace->job) == seen) {
        futex_wait(&workspace->job, seen);
    }
    atomic_fetch_sub(&workspace->n_asleep, 1);
}

static void *run_thread(void *argument) {
    struct expertd_workspace *workspace = argument;
    uint32_t seen = 0;
    for (;;) {
        await_job(workspace, seen);
        seen = atomic_load(&workspace->job);
        if (atomic_load(&workspace->is_ending)) {
            return NULL;
        }
        take_items(workspace);
    }
}

static void announce_job(struct expertd_workspace *workspace) {
    atomic_fetch_add(&workspace->job, 1);
    if (atomic_load(&workspace->n_asleep) > 0) {
        futex_wake(&workspace->job, THREADS_MAX);
    }
}

/* Return when all items are done that other threads took. */
static void await_items(struct expertd_workspace *workspace, uint32_t n_items) {
    int64_t end = now_ns() + spin_ns;
    while (atomic_load(&workspace->n_done) != n_items) {
        if (now_ns() < end) {
            pause_briefly();
            continue;
        }
        atomic_store(&workspace->is_caller_asleep, true);
        uint32_t n_done = atomic_load(&workspace->n_done);
        if (n_done != n_items) {
            futex_wait(&workspace->n_done, n_done);
        }
        atomic_store(&workspace->is_caller_asleep, false);
    }
}

static void run_job(struct expertd_workspace *workspace, int64_t n_items) {
    atomic_store(&workspace->n_done, 0);
    atomic_store(&workspace->ticket, make_ticket(atomic_load(&workspace->job) + 1, n_items));
    announce_job(workspace);
    take_items(workspace);
    await_items(workspace, (uint32_t)n_items);
}

void share_out(struct expertd_workspace *workspace, item_function *compute, void *context, int64_t n_items) {
    if (workspace->n_others == 0 || n_items <= 1) {
        for (int64_t item = 0; item < n_items; item++) {
            compute(context, item);
        }
        return;
    }
    workspace->compute = compute;
    workspace->context = context;
    for (int64_t first = 0; first < n_items; first += JOB_ITEMS_MAX) {
        int64_t left = n_items - first;
        workspace->first_item = first;
        run_job(workspace, left < JOB_ITEMS_MAX ? left : JOB_ITEMS_MAX);
    }
}

int64_t n_threads_of(const struct expertd_workspace *workspace) { return workspace->n_others + 1; }

void *scratch(struct expertd_workspace *workspace, int slot, int64_t nbytes) {
    struct memory *memory = &workspace->memory[slot];
    if (memory->nbytes < nbytes) {
        free(memory->bytes);
        size_t rounded = ((size_t)nbytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
        memory->bytes = aligned_alloc(CACHE_LINE, rounded);
        memory->nbytes = memory->bytes == NULL ? 0 : (int64_t)rounded;
    }
    return memory->bytes;
}

int enter(struct expertd_workspace *workspace) {
    if (workspace == NULL) {
        return EXPERTD_NO_WORKSPACE;
    }
    if (workspace->pid != getpid()) {
        return EXPERTD_FORKED;
    }
    return atomic_exchange(&workspace->is_entered, true) ? EXPERTD_BUSY : EXPERTD_OK;
}

void count_products(struct expertd_workspace *workspace, int64_t start_ns) {
    workspace->products_ns += now_ns() - start_ns;
}

void leave(struct expertd_workspace *workspace) { atomic_store(&workspace->is_entered, false); }

static void free_workspace(struct expertd_workspace *workspace) {
    for (int slot = 0; slot < SCRATCH_SLOTS; slot++) {
        free(workspace->memory[slot].bytes);
    }
    free(workspace->others);
    free(workspace);
}

static void end_threads(struct expertd_workspace *workspace) {
    atomic_store(&workspace->is_ending, true);
    announce_job(workspace);
    for (int64_t i = 0; i < workspace->n_others; i++) {
        pthread_join(workspace->others[i], NULL);
    }
}

/* Start the threads; return whether all could be. Signals are the caller's: none of these threads takes one. */
static bool start_threads(struct expertd_workspace *workspace, int64_t n_others) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int64_t i = 0; i < n_others; i++) {
        if (pthread_create(&workspace->others[i], NULL, run_thread, workspace) != 0) {
            break;
        }
        workspace->n_others++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return workspace->n_others == n_others;
}

int expertd_workspace_start(int64_t n_threads, struct expertd_workspace **started) {
    if (n_threads < 1 || n_threads > THREADS_MAX || started == NULL) {
        return EXPERTD_BAD_LENGTH;
    }
    struct expertd_workspace *workspace = aligned_alloc(CACHE_LINE, sizeof *workspace);
    if (workspace == NULL) {
        return EXPERTD_NO_MEMORY;
    }
    *workspace = (struct expertd_workspace){.pid = getpid()};
    workspace->others = calloc((size_t)n_threads, sizeof *workspace->others);
    if (workspace->others == NULL || !start_threads(workspace, n_threads - 1)) {
        end_threads(workspace);
        free_workspace(workspace);
        return EXPERTD_NO_MEMORY;
    }
    *started = workspace;
    return EXPERTD_OK;
}

int expertd_workspace_stay_awake(struct expertd_workspace *workspace, int64_t stays_awake) {
    if (workspace == NULL) {
        return EXPERTD_NO_WORKSPACE;
    }
    atomic_store(&workspace->stays_awake, stays_awake != 0);
    return EXPERTD_OK;
}

int expertd_workspace_products_ns(const struct expertd_workspace *workspace, int64_t *products_ns) {
    if (workspace == NULL) {
        return EXPERTD_NO_WORKSPACE;
    }
    if (!is_aligned_to(8, products_ns)) {
        return EXPERTD_BAD_ALIGNMENT;
    }
    *products_ns = workspace->products_ns;
    return EXPERTD_OK;
}

int expertd_workspace_stop(struct expertd_workspace *workspace) {
    if (workspace == NULL) {
        return EXPERTD_NO_WORKSPACE;
    }
    if (workspace->pid == getpid()) {
        int status = enter(workspace);
        if (status != EXPERTD_OK) {
            return status;
        }
        end_threads(workspace);
    } /* else a forked child, which has none of the threads */
    free_workspace(workspace);
    return EXPERTD_OK;
}
