#include "refine_loops.h"
#include "solver_loops.h"

const struct solver_loops solver_loops_avx2 = {start, improve, write_codes, refine, refine_on_grid};
