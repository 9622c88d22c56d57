/* Which kernels are used: the fastest that the machine has, unless another set was asked for. */

#include <stdatomic.h>
#include <string.h>

#include "panels.h"

static _Atomic(const struct kernels *) chosen;

static const struct kernels *fastest_kernels(void) {
#ifdef EXPERTD_HAS_AVX2
    /* Every processor with AVX2 has F16C, which not all compilers know to ask for. */
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return &avx2_kernels;
    }
#endif
    return &portable_kernels;
}

const struct kernels *kernels_in_use(void) {
    const struct kernels *kernels = atomic_load(&chosen);
    return kernels != NULL ? kernels : fastest_kernels();
}

int expertd_use_kernels(const char *name) {
    const struct kernels *candidates[] = {fastest_kernels(), &portable_kernels};
    for (size_t i = 0; name != NULL && i < sizeof candidates / sizeof *candidates; i++) {
        if (strcmp(name, candidates[i]->name) == 0) {
            atomic_store(&chosen, candidates[i]);
            return EXPERTD_OK;
        }
    }
    return EXPERTD_UNKNOWN_FORMAT;
}

const char *expertd_kernels_name(void) { return kernels_in_use()->name; }
