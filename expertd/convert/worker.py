"""One worker process of the converter: reads matrices, encodes them, writes them at their planned places.

A process of its own because the solver is thousands of small operations: threads would spend their time waiting for
the interpreter. A task says all about one record; what is written depends on it alone, as it is computed with one
thread. It holds one matrix and its encoding at a time, never a whole record. The end of its input ends it, so that none
outlives the converter.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from expertd.convert.errors import ConvertError, EncodeFailed
from expertd.convert.matrices import fits_fp16, read_matrix, strips
from expertd.convert.worker_messages import (
    Event,
    Failed,
    Job,
    MatrixDone,
    MatrixSource,
    RecordDone,
    Task,
    dump_event,
    load_job,
    load_task,
)
from expertd.convert.writer import RecordFiles
from protocol.errors import LayoutError
from protocol.layout import R8, Part, record_spans
from protocol.schemes import BF16, FP16
from quant.encode import encode_part
from quant.errors import QuantError
from quant.weight_error import weight_error

_PIECE_NBYTES = 4 << 20


def main(job_text: str) -> None:
    """Do the tasks that come on standard input, until it ends or one fails."""
    torch.set_num_threads(1)
    events = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not stand among the events
    try:
        _run(load_job(job_text), events)
    except ConvertError as error:
        _tell(events, Failed(type(error).__name__, str(error)))
    except ConnectionError:
        pass  # the converter is gone


@dataclass(frozen=True, slots=True)
class _Encoder:
    """What one worker reads from, writes to and speaks through."""

    files: RecordFiles
    solver: str
    refine: bool
    events: int

    def encode(self, task: Task) -> None:
        """Write one record, telling of each matrix and of the whole."""
        spans = record_spans(R8, task.parts)
        bounds = [*(span.offset for span in spans), task.nbytes]
        checksum = xxhash.xxh3_128()
        schemes, weight_errors = [], []
        for index, (span, (begin, end)) in enumerate(zip(spans, pairwise(bounds), strict=True)):
            part, encoded, lost = self._encode_matrix(task.matrices[index], span.part)
            offset = begin
            for data in _padded(encoded, end - begin):
                self.files.write(task.file, task.offset + offset, data)
                checksum.update(data)
                offset += len(data)
            schemes.append(part.scheme)
            weight_errors.append(lost)
            _tell(self.events, MatrixDone(task.record, index))
        _tell(self.events, RecordDone(task.record, tuple(schemes), tuple(weight_errors), checksum.hexdigest()))

    def _encode_matrix(self, matrix: MatrixSource, planned: Part) -> tuple[Part, Tensor, float]:
        """Return the part with the scheme that its weights allow, its bytes, u8 [part_nbytes], and what they lost."""
        weight = read_matrix(matrix, planned.rows, planned.cols)
        part = _fitting_part(weight, planned)
        try:
            encoded = encode_part(weight, part, solver=self.solver, refine=self.refine)
        except (QuantError, LayoutError) as error:
            raise EncodeFailed(f"{matrix.hub_name}: {error}") from None
        return part, encoded, weight_error(weight, part, encoded)


def _run(job: Job, events: int) -> None:
    with RecordFiles(Path(job.folder), Path(job.target), job.files) as files:
        encoder = _Encoder(files, job.config.solver, job.config.refine, events)
        for line in sys.stdin:
            encoder.encode(load_task(line))


def _padded(encoded: Tensor, nbytes: int) -> Iterator[bytearray]:
    """Yield a part's bytes in pieces, then zeros: the padding up to the next part is written and checked like it."""
    for piece in strips(encoded, _PIECE_NBYTES):
        data = bytearray(piece.numel())
        torch.frombuffer(data, dtype=torch.uint8)[:] = piece
        yield data
    if nbytes > encoded.numel():
        yield bytearray(nbytes - encoded.numel())


def _fitting_part(weight: Tensor, planned: Part) -> Part:
    """Return the part with the scheme that holds the weights: bf16 for those that fp16 would make infinite."""
    if planned.scheme == FP16.name and not fits_fp16(weight):
        return replace(planned, scheme=BF16.name)
    return planned


def _tell(events: int, event: Event) -> None:
    os.write(events, dump_event(event))
