"""What a run has finished, so that the next one goes on from there: a line a record in the working folder.

A line is written when a record is, and says no more than that somebody wrote it: after a power failure the record may
be gone. So who goes on trusts only records whose bytes still have their checksum.
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

from expertd.convert.interruption import Interruption
from expertd.convert.plan import PlannedRecord
from expertd.convert.staging import Staging, disk_errors
from expertd.convert.worker_messages import RecordDone, dump_event, load_event
from protocol.schemes import BF16, FP16

JOURNAL_FILE = "journal"

_READ_NBYTES = 4 << 20
_LINE_NBYTES_MAX = 1 << 16


class Journal:
    """The records finished so far by their number in the plan, and the file that remembers them."""

    def __init__(self, file: BinaryIO, target: Path, done: dict[int, RecordDone]) -> None:
        self.done = done
        self._file = file
        self._target = target

    def add(self, record: RecordDone) -> None:
        """Remember a finished record; raise NoDiskSpace or WriteFailed."""
        self.done[record.record] = record
        with disk_errors(self._target):
            self._file.write(dump_event(record))


@contextmanager
def open_journal(staging: Staging, plan: Sequence[PlannedRecord], asked: Interruption) -> Iterator[Journal]:
    """Yield the journal of what is being built, with those of its records that are still whole."""
    path, renewed = staging.folder / JOURNAL_FILE, staging.folder / f"{JOURNAL_FILE}.new"
    with disk_errors(staging.target):
        told = _read(path, plan) if path.exists() else {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        checks = pool.map(lambda record: _is_whole(staging.path, plan[record.record], record, asked), told.values())
        done = {record.record: record for record, is_whole in zip(told.values(), checks, strict=True) if is_whole}
    asked.check()
    with ExitStack() as opened:
        # Written anew: after a line that was cut nothing could be added. And renamed: a kill here forgets nothing.
        with disk_errors(staging.target):
            file = opened.enter_context(renewed.open("wb", buffering=0))
            file.write(b"".join(map(dump_event, done.values())))
            renewed.rename(path)
        yield Journal(file, staging.target, done)


def _read(path: Path, plan: Sequence[PlannedRecord]) -> dict[int, RecordDone]:
    """Return what the lines say, up to the first that does not fit the plan: a kill may have cut the last one."""
    told: dict[int, RecordDone] = {}
    with path.open("rb") as file:
        while line := file.readline(_LINE_NBYTES_MAX):
            try:
                event = load_event(line)
            except (ValueError, TypeError):
                break
            if not isinstance(event, RecordDone) or not _fits(event, plan):
                break
            told[event.record] = event
    return told


def _fits(record: RecordDone, plan: Sequence[PlannedRecord]) -> bool:
    if type(record.record) is not int or not 0 <= record.record < len(plan):
        return False
    planned = [part.scheme for part in plan[record.record].parts]
    # bf16 stands where weights did not fit fp16.
    fallen_back = [BF16.name if scheme == FP16.name else scheme for scheme in planned]
    errors_are_numbers = all(isinstance(lost, float) and math.isfinite(lost) for lost in record.weight_errors)
    return (
        len(record.schemes) == len(record.weight_errors) == len(planned)
        and errors_are_numbers
        and all(
            scheme in pair for scheme, pair in zip(record.schemes, zip(planned, fallen_back, strict=True), strict=True)
        )
    )


def _is_whole(store: Path, planned: PlannedRecord, record: RecordDone, asked: Interruption) -> bool:
    """Return whether the record's bytes are those that were written; False as soon as the run is to end."""
    checksum = xxhash.xxh3_128()
    try:
        with (store / planned.file).open("rb", buffering=0) as file:
            file.seek(planned.offset)
            rest = planned.nbytes
            while rest and not asked.is_asked:
                data = file.read(min(rest, _READ_NBYTES))
                if not data:
                    return False
                checksum.update(data)
                rest -= len(data)
    except OSError:
        return False
    return not rest and checksum.hexdigest() == record.xxh3_128
