"""Every byte of a store on disk against its checksums, in worker threads. Needs no daemon."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import local

from expertd.store import StoreFiles
from protocol.manifest import Record


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked, and the names of what is wrong."""

    n_checked: int
    nbytes: int
    wrong: tuple[str, ...]


def verify_store(path: Path, on_progress: Callable[[int, int], None]) -> VerifyReport:
    """Return which records and files of a store are damaged; raise StoreInvalid if it cannot be read at all.

    `on_progress` is called with the bytes checked and the bytes there are.
    """
    with StoreFiles(path) as files, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        manifest = files.manifest
        records = [
            *manifest.dense.items(),
            *((str(key), record) for key, record in manifest.experts.items()),
        ]
        nbytes = manifest.dense_nbytes + manifest.experts_nbytes
        buffers = local()
        wrong = []
        done_nbytes = 0
        checks = pool.map(lambda item: _is_intact(files, item[1], buffers), records)
        for (name, record), is_intact in zip(records, checks, strict=True):
            done_nbytes += record.nbytes
            on_progress(done_nbytes, nbytes)
            if not is_intact:
                wrong.append(name)
        wrong += [file.name for file in manifest.files if not files.side_file_matches(file)]
    return VerifyReport(len(records) + len(manifest.files), nbytes, tuple(wrong))


def _is_intact(files: StoreFiles, record: Record, buffers: local) -> bool:
    """Read into a buffer that each thread keeps: fresh memory for every record would cost more than the check."""
    buffer = getattr(buffers, "buffer", None)
    if buffer is None or len(buffer) < record.nbytes:
        buffer = buffers.buffer = bytearray(record.nbytes)
    with memoryview(buffer)[: record.nbytes] as target:
        try:
            return files.read_record(record, target)
        except OSError:
            return False
