/* Computes the cases of a file with the library and writes what comes out: compute_cases CASES RESULTS N_THREADS.
 *
 * A file of cases is a sequence of int64 and of arrays, each array behind its length in bytes and filled up to whole
 * int64. A case begins with what it is:
 *
 *     1 (products)   is_exact, n_tokens, cols; x; number of parts, then the parts
 *     2 (experts)    is_exact, n_tokens, hidden_size, top_k; hidden_states, expert_ids, weights; number of experts, then
 *                    gate, up and down of each
 *
 * and a part is format, rows, cols and its bytes. A result is the float32 of all outputs: of each product, or
 * contributions and out. Cases come from the same hand that reads the results: nothing is checked but their status. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "api.h"

enum { PRODUCTS = 1, EXPERTS = 2, EXPERTS_MAX = 64, PARTS_MAX = 8 };

static void fail(const char *what, long long number) {
    fprintf(stderr, "compute_cases: %s %lld\n", what, number);
    exit(1);
}

static int64_t read_number(FILE *cases) {
    int64_t n;
    if (fread(&n, sizeof n, 1, cases) != 1) {
        fail("the cases end at byte", ftell(cases));
    }
    return n;
}

static void *read_array(FILE *cases, int64_t *nbytes) {
    *nbytes = read_number(cases);
    size_t n_words = ((size_t)*nbytes + 7) / 8;
    void *array = malloc(n_words * 8);
    if (array == NULL || fread(array, 8, n_words, cases) != n_words) {
        fail("the cases end within an array at byte", ftell(cases));
    }
    return array;
}

static struct expertd_part read_part(FILE *cases) {
    struct expertd_part part;
    part.format = read_number(cases);
    part.rows = read_number(cases);
    part.cols = read_number(cases);
    part.bytes = read_array(cases, &part.nbytes);
    return part;
}

static float *floats(int64_t n) {
    float *array = calloc((size_t)n, sizeof *array);
    return array != NULL ? array : (fail("no memory for floats:", n), NULL);
}

static void write_floats(FILE *results, const float *array, int64_t n) {
    if (fwrite(array, sizeof *array, (size_t)n, results) != (size_t)n) {
        fail("cannot write floats:", n);
    }
}

static void compute_products(FILE *cases, FILE *results, struct expertd_workspace *workspace) {
    int64_t is_exact = read_number(cases), n_tokens = read_number(cases), cols = read_number(cases), nbytes;
    const float *x = read_array(cases, &nbytes);
    int64_t n_parts = read_number(cases);
    struct expertd_product products[PARTS_MAX];
    for (int64_t i = 0; i < n_parts; i++) {
        products[i].part = read_part(cases);
        products[i].y_length = n_tokens * products[i].part.rows;
        products[i].y = floats(products[i].y_length);
    }
    int status = expertd_multiply(workspace, products, n_parts, x, n_tokens * cols, n_tokens, is_exact);
    if (status != EXPERTD_OK) {
        fail("expertd_multiply returned", status);
    }
    for (int64_t i = 0; i < n_parts; i++) {
        write_floats(results, products[i].y, products[i].y_length);
    }
}

static void compute_experts(FILE *cases, FILE *results, struct expertd_workspace *workspace) {
    int64_t is_exact = read_number(cases), nbytes;
    struct expertd_choice choice = {.n_tokens = read_number(cases)};
    choice.hidden_size = read_number(cases);
    choice.top_k = read_number(cases);
    choice.hidden_states = read_array(cases, &nbytes);
    choice.expert_ids = read_array(cases, &nbytes);
    choice.weights = read_array(cases, &nbytes);
    choice.n_experts = read_number(cases);
    struct expertd_expert experts[EXPERTS_MAX];
    const struct expertd_expert *table[EXPERTS_MAX];
    for (int64_t i = 0; i < choice.n_experts; i++) {
        experts[i].gate = read_part(cases);
        experts[i].up = read_part(cases);
        experts[i].down = read_part(cases);
        table[i] = &experts[i];
    }
    choice.experts = table;
    int64_t out_length = choice.n_tokens * choice.hidden_size;
    choice.contributions = floats(out_length * choice.top_k);
    choice.out = floats(out_length);
    int status = expertd_compute_experts(workspace, &choice, is_exact);
    if (status != EXPERTD_OK) {
        fail("expertd_compute_experts returned", status);
    }
    write_floats(results, choice.contributions, out_length * choice.top_k);
    write_floats(results, choice.out, out_length);
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fail("arguments expected: 3, came:", argc - 1);
    }
    FILE *cases = fopen(argv[1], "rb"), *results = fopen(argv[2], "wb");
    struct expertd_workspace *workspace = NULL;
    if (cases == NULL || results == NULL || expertd_workspace_start(atoi(argv[3]), &workspace) != EXPERTD_OK) {
        fail("cannot open the files or start threads:", atoi(argv[3]));
    }
    int64_t n_cases = read_number(cases);
    for (int64_t i = 0; i < n_cases; i++) {
        int64_t kind = read_number(cases);
        if (kind == PRODUCTS) {
            compute_products(cases, results, workspace);
        } else if (kind == EXPERTS) {
            compute_experts(cases, results, workspace);
        } else {
            fail("unknown kind of case:", kind);
        }
    }
    printf("%s\n", expertd_kernels_name());
    expertd_workspace_stop(workspace);
    return fclose(results) == 0 ? 0 : 1;
}
