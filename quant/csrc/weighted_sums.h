/* Sums of numbers times vectors: what both halves of attention are made of. */

#ifndef EXPERTD_WEIGHTED_SUMS_H
#define EXPERTD_WEIGHTED_SUMS_H

#include <stdbool.h>
#include <stdint.h>

enum {
    SUM_ROWS = 4,     /* rows of sums that are computed at once, or one alone */
    SUM_COLUMNS = 16, /* the columns are a multiple of this */
};

/* sums[row, column] = fma(factors[row, i], vectors[i, column], sums[row, column]) for i = 0 … n_terms - 1 in that
 * order, so that neither the number of rows nor that of columns changes a bit. */
struct weighted_sums {
    const float *factors; /* [n_rows, n_terms] */
    int64_t factors_stride;
    const void *vectors; /* [n_terms, n_columns], fp16 or float32 */
    int64_t vectors_stride;
    bool is_fp16;
    bool begins_at_zero; /* whatever the sums hold */
    int n_rows;          /* SUM_ROWS or 1 */
    int64_t n_terms;
    int64_t n_columns;
    float *sums; /* [n_rows, n_columns] */
    int64_t sums_stride;
};

void add_weighted_sums(const struct weighted_sums *weighted);

#endif
