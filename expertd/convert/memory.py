"""How much memory a conversion takes, and how many workers fit into it. Pure arithmetic on measured figures.

A worker holds a piece of one matrix at a time: the rows as the checkpoint has them, what the solver makes of them, and
their bytes. The largest piece takes as much as fits beside a worker, so that no model takes more.
"""

from dataclasses import dataclass
from typing import Final

from expertd.convert.checkpoint import Checkpoint
from expertd.convert.hqq_layout import HqqPlace
from expertd.convert.plan import PlannedRecord, StorePlan
from protocol.layout import Part
from protocol.schemes import scheme_named

# What all processes of a conversion may hold together unless somebody asks for more workers.
LIMIT_NBYTES: Final = 3_000_000_000

# The most weights of a piece. Above every known expert's matrix (100 million in Mixtral-8x22B): how a matrix is cut
# shows in the bytes.
QUANTIZED_NELEMENTS_MAX: Final = 1 << 27
SIXTEEN_BIT_NELEMENTS_MAX: Final = 1 << 22

# Measured as resident sizes: the converter and the process that fetches shards; a worker that has imported torch.
_FIXED_NBYTES = 220_000_000
_WORKER_NBYTES = 240_000_000
# For each weight of the piece that is worked on, at its peak: 7.5 from a 16-bit checkpoint, 2 more from a 32-bit one.
# That is with the C library; without it three times as much.
_QUANTIZED_NBYTES = 10.0
_SIXTEEN_BIT_NBYTES = 12.0
# One that was quantized before is unpacked whole, to 4 bytes a weight.
_UNPACKED_NBYTES = 6.0


@dataclass(frozen=True, slots=True)
class Crew:
    """How many workers there are, and what all processes hold together at most."""

    n_jobs: int
    held_nbytes: int

    @property
    def budget_nbytes(self) -> int:
        """What the workers may hold together beside themselves."""
        return self.held_nbytes - _FIXED_NBYTES - self.n_jobs * _WORKER_NBYTES


def record_need_nbytes(planned: PlannedRecord, checkpoint: Checkpoint) -> int:
    """Return what a worker holds beside itself when it writes that record."""
    needs = []
    for part, matrix in zip(planned.parts, planned.matrices, strict=True):
        need_nbytes = _piece_nbytes(part)
        if isinstance(checkpoint.place_of(matrix), HqqPlace):
            need_nbytes += int(part.rows * part.cols * _UNPACKED_NBYTES)
        needs.append(need_nbytes)
    return max(needs)


def crew_of(plan: StorePlan, checkpoint: Checkpoint, *, n_asked: int | None, n_processors: int) -> Crew:
    """Return the workers: as many as were asked for; else at most one a processor, as many as write experts at once
    within the limit, at least 1.
    """
    experts = [record_need_nbytes(planned, checkpoint) for planned in plan.records if planned.key is not None]
    each_nbytes = _WORKER_NBYTES + max(experts)
    if n_asked is not None:
        n_jobs = min(n_asked, len(plan.records))
        return Crew(n_jobs, max(LIMIT_NBYTES, _FIXED_NBYTES + n_jobs * each_nbytes))
    return Crew(max(1, min(n_processors, (LIMIT_NBYTES - _FIXED_NBYTES) // each_nbytes)), LIMIT_NBYTES)


def _piece_nbytes(part: Part) -> int:
    n_weights = part.rows * part.cols
    if scheme_named(part.scheme).is_quantized:
        return int(min(n_weights, QUANTIZED_NELEMENTS_MAX) * _QUANTIZED_NBYTES)
    return int(min(n_weights, SIXTEEN_BIT_NELEMENTS_MAX) * _SIXTEEN_BIT_NBYTES)
