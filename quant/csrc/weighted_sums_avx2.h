/* add_weighted_sums (weighted_sums.h) with AVX2, FMA and F16C. */

#ifndef EXPERTD_WEIGHTED_SUMS_AVX2_H
#define EXPERTD_WEIGHTED_SUMS_AVX2_H

#include "weighted_sums.h"

void add_weighted_sums_avx2(const struct weighted_sums *weighted);

#endif
