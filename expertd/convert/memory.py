"""How much memory a conversion takes, and how many workers fit into it. Pure arithmetic on measured figures.

A worker holds one matrix at a time: the matrix as the checkpoint has it, what the solver makes of it, and its bytes.
"""

from expertd.convert.plan import PlannedRecord, StorePlan
from protocol.schemes import scheme_named

# What all processes of a conversion may hold together unless somebody asks for more workers.
LIMIT_NBYTES = 3_000_000_000

# Measured as resident sizes: the converter and the process that fetches shards; a worker that has imported torch.
_FIXED_NBYTES = 220_000_000
_WORKER_NBYTES = 240_000_000
# For each weight of the matrix that is worked on, at its peak: 7.5 from a 16-bit checkpoint, 2 more from a 32-bit one.
# That is with the C library; without it three times as much.
_QUANTIZED_NBYTES = 10.0
_SIXTEEN_BIT_NBYTES = 7.0


def record_need_nbytes(planned: PlannedRecord) -> int:
    """Return what a worker holds beside itself when it writes that record."""
    needs = []
    for part in planned.parts:
        per_weight = _QUANTIZED_NBYTES if scheme_named(part.scheme).is_quantized else _SIXTEEN_BIT_NBYTES
        needs.append(int(part.rows * part.cols * per_weight))
    return max(needs)


def jobs_that_fit(plan: StorePlan, n_processors: int) -> int:
    """Return how many workers, at most one a processor, can write experts at once within the limit; at least 1."""
    experts = [record_need_nbytes(planned) for planned in plan.records if planned.key is not None]
    room = LIMIT_NBYTES - _FIXED_NBYTES
    return max(1, min(n_processors, room // (_WORKER_NBYTES + max(experts))))


def records_budget_nbytes(n_jobs: int) -> int:
    """Return what so many workers may hold together beside themselves."""
    return LIMIT_NBYTES - _FIXED_NBYTES - n_jobs * _WORKER_NBYTES
