/* Which kernels are used: the fastest that the machine has, unless another set was asked for. */

#include <stdatomic.h>
#include <string.h>

#include "panels.h"

static _Atomic(const struct kernels *) chosen;

#ifdef EXPERTD_HAS_AVX2
/* Every processor with AVX2 has F16C, which not all compilers know to ask for. */
static bool has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#ifdef EXPERTD_HAS_VNNI
static bool has_vnni(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

static bool has_portable(void) { return true; }

/* All sets, the fastest first. */
static const struct {
    const struct kernels *kernels;
    bool (*is_supported)(void);
} sets[] = {
#ifdef EXPERTD_HAS_VNNI
    {&vnni_kernels, has_vnni},
#endif
#ifdef EXPERTD_HAS_AVX2
    {&avx2_kernels, has_avx2},
#endif
    {&portable_kernels, has_portable},
};

enum { N_SETS = sizeof sets / sizeof *sets };

static const struct kernels *fastest_kernels(void) {
    int i = 0;
    while (!sets[i].is_supported()) {
        i++;
    }
    return sets[i].kernels;
}

const struct kernels *kernels_in_use(void) {
    const struct kernels *kernels = atomic_load(&chosen);
    return kernels != NULL ? kernels : fastest_kernels();
}

int expertd_use_kernels(const char *name) {
    for (int i = 0; i < N_SETS && name != NULL; i++) {
        if (strcmp(name, sets[i].kernels->name) == 0 && sets[i].is_supported()) {
            atomic_store(&chosen, sets[i].kernels);
            return EXPERTD_OK;
        }
    }
    return EXPERTD_UNKNOWN_FORMAT;
}

const char *expertd_kernels_name(void) { return kernels_in_use()->name; }
