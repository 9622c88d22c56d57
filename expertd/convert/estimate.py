"""How long a conversion takes on this machine: one expert of the model's size for each worker, of random weights, read,
solved, packed and written by the workers that do the real one.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from expertd.convert.config import QuantizeConfig
from expertd.convert.interruption import Interruption
from expertd.convert.plan import PlannedRecord, StorePlan
from expertd.convert.safetensors_header import TensorSlot
from expertd.convert.shard import Shard, TensorPlace
from expertd.convert.staging import disk_errors
from expertd.convert.worker_messages import Done, Job, MatrixDone, MatrixSource, RecordDone, Task
from expertd.convert.worker_pool import do_work
from protocol.layout import Part
from protocol.schemes import scheme_named

_BLOCK_NELEMENTS = 1 << 22
_STD = 0.02
_WEIGHTS_FILE = "weights"
_RECORDS_FILE = "records"
# A 16-bit matrix is copied, a quantized one solved: counted as so many times less work.
_COPY_SHARE = 0.05


@dataclass(slots=True)
class _Trial:
    """One task for each worker; when each of its matrices was done."""

    todo: list[Task]
    n_unfinished: int
    done_at: dict[int, list[float]] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether all tasks are finished."""
        return self.n_unfinished == 0

    def next_task(self) -> Task | None:
        """Return a task, None when all are given out."""
        return self.todo.pop() if self.todo else None

    def next_shard(self) -> None:
        """Return None: nothing is fetched."""

    def take(self, event: Done) -> None:
        """Take down when something was done."""
        if isinstance(event, MatrixDone):
            self.done_at.setdefault(event.record, []).append(time.monotonic())
        elif isinstance(event, RecordDone):
            self.n_unfinished -= 1


def measured_seconds(plan: StorePlan, config: QuantizeConfig, n_jobs: int, asked: Interruption) -> float:
    """Return about how long the plan takes with so many workers; raise ConvertError."""
    expert = next(record for record in plan.records if record.key is not None)
    with tempfile.TemporaryDirectory(prefix="expertd-plan-") as name:
        folder = Path(name)
        with disk_errors(folder):
            source = _write_weights(folder / _WEIGHTS_FILE, expert)
            (folder / _RECORDS_FILE).touch()
        tasks = [_task(number, expert, source, folder) for number in range(n_jobs)]
        trial = _Trial(tasks, n_jobs)
        job = Job(name, name, (_RECORDS_FILE,), config)
        do_work(trial, job, None, asked, n_jobs=n_jobs)
    # Up to its first matrix a worker starts; from there on it works.
    rate = sum(_work(expert.parts[1:]) / (times[-1] - times[0]) for times in trial.done_at.values())
    return sum(_work(record.parts) for record in plan.records) / rate


def _work(parts: Sequence[Part]) -> float:
    """Return the weights of those parts, those that are only copied counted as what copying takes."""
    shares = (1.0 if scheme_named(part.scheme).is_quantized else _COPY_SHARE for part in parts)
    return sum(part.rows * part.cols * share for part, share in zip(parts, shares, strict=True))


def _write_weights(path: Path, expert: PlannedRecord) -> list[TensorPlace]:
    """Write the matrices of one expert, bf16; return their places."""
    data = bytearray(2 * _BLOCK_NELEMENTS)
    block = torch.randn(_BLOCK_NELEMENTS, generator=torch.Generator().manual_seed(0)).mul_(_STD)
    torch.frombuffer(data, dtype=torch.bfloat16).copy_(block)
    slots, offset = [], 0
    with path.open("wb") as file:
        for part in expert.parts:
            nbytes = 2 * part.rows * part.cols
            slots.append(TensorSlot("BF16", (part.rows, part.cols), offset, nbytes))
            offset += nbytes
            while nbytes:
                nbytes -= file.write(memoryview(data)[:nbytes])
    shard = Shard(path.name, offset)
    return [TensorPlace(shard, slot) for slot in slots]


def _task(number: int, expert: PlannedRecord, places: list[TensorPlace], folder: Path) -> Task:
    path = str(folder / _WEIGHTS_FILE)
    matrices = tuple(
        MatrixSource(matrix.hub_name, path, place) for matrix, place in zip(expert.matrices, places, strict=True)
    )
    return Task(number, _RECORDS_FILE, number * expert.nbytes, expert.nbytes, expert.parts, matrices)
