/* Rows of fp16 numbers from float32 ones and back: to the nearest, ties to even, beyond the largest to infinity. The
 * same bits with F16C instructions and without. */

#ifndef EXPERTD_HALVES_H
#define EXPERTD_HALVES_H

#include <stdint.h>

void halves_to_floats(const uint16_t *halves, int64_t n, float *floats);
void floats_to_halves(const float *floats, int64_t n, uint16_t *halves);

#endif
