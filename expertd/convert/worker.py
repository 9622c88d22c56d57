"""One worker process of the converter: reads matrices, encodes them, writes them at their planned places.

A process of its own because the solver is thousands of small operations: threads would spend their time waiting for
the interpreter. A task says all about one record; what is written depends on it alone, as it is computed with one
thread. It holds a piece of a matrix and its encoding at a time, never a whole record. The end of its input ends it, so
that none outlives the converter.
"""

import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import xxhash

from expertd.convert.errors import ConvertError
from expertd.convert.matrices import SourceMatrix
from expertd.convert.pieces import EncodedMatrix
from expertd.convert.worker_messages import (
    Event,
    Failed,
    Job,
    MatrixDone,
    RecordDone,
    Task,
    dump_event,
    load_job,
    load_task,
)
from expertd.convert.writer import RecordFiles
from protocol.layout import R8, record_spans

_READ_NBYTES = 4 << 20


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
            source = task.matrices[index]
            matrix = SourceMatrix(source, span.part.rows, span.part.cols)
            encoded = EncodedMatrix(matrix, span.part, solver=self.solver, refine=self.refine)
            self._write_part(task, (begin, end), encoded, source.hub_name, checksum)
            schemes.append(encoded.part.scheme)
            weight_errors.append(encoded.weight_error)
            _tell(self.events, MatrixDone(task.record, index))
        _tell(self.events, RecordDone(task.record, tuple(schemes), tuple(weight_errors), checksum.hexdigest()))

    def _write_part(
        self, task: Task, span: tuple[int, int], encoded: EncodedMatrix, hub_name: str, checksum: xxhash.xxh3_128
    ) -> None:
        """Write a matrix and the zeros up to the next one: they are checked like it."""
        begin, end = span
        filled = begin
        for placed in encoded.bytes(hub_name):
            self._write(task, begin + placed.offset, placed.data)
            filled = begin + placed.offset + len(placed.data)
            if encoded.is_in_order:
                checksum.update(placed.data)
        padding = bytes(end - filled)
        self._write(task, filled, padding)
        if encoded.is_in_order:
            checksum.update(padding)
            return
        for offset in range(begin, end, _READ_NBYTES):
            checksum.update(self.files.read(task.file, task.offset + offset, min(_READ_NBYTES, end - offset)))

    def _write(self, task: Task, offset: int, data: bytes | bytearray) -> None:
        self.files.write(task.file, task.offset + offset, data)


def _run(job: Job, events: int) -> None:
    with RecordFiles(Path(job.folder), Path(job.target), job.files) as files:
        encoder = _Encoder(files, job.config.solver, job.config.refine, events)
        for line in sys.stdin:
            encoder.encode(load_task(line))


def _tell(events: int, event: Event) -> None:
    os.write(events, dump_event(event))
