"""From a checkpoint to a store: check, plan, reserve, encode, commit. The converter's front door.

Everything that can be refused is refused before a weight is read. The store appears at its place whole or not at all.
"""

import hashlib
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertd.convert.checkpoint import Checkpoint, open_checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import ConfigError, NoDiskSpace
from expertd.convert.interruption import interruption
from expertd.convert.mixtral import TensorClass, model_facts
from expertd.convert.plan import PlannedRecord, StorePlan, plan_store
from expertd.convert.staging import check_target, disk_errors, staged
from expertd.convert.worker_messages import Job
from expertd.convert.worker_pool import WrittenRecord, encode_records
from expertd.convert.writer import new_record_files, write_file
from protocol.layout import R8
from protocol.manifest import MANIFEST_FILE, Manifest, Record, SideFile, TensorSchemes, dump_manifest

# Of the right length, or as long as there is: what a manifest weighs is known before checksums and errors are.
_NO_CHECKSUM = "0" * 32
_NO_ERROR = 1.2345e-05


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is, in bytes of the checkpoint's weights; `tensor` was finished last."""

    done_nbytes: int
    total_nbytes: int
    tensor: str


def quantize_checkpoint(
    checkpoint: Path,
    store: Path,
    config: QuantizeConfig,
    *,
    force: bool,
    n_jobs: int,
    on_progress: Callable[[Progress], None],
) -> Manifest:
    """Write the store of a checkpoint with `n_jobs` worker processes; return its manifest; raise ConvertError.

    `on_progress` is called in the calling thread after every matrix. In the main thread SIGINT ends the work with
    KeyboardInterrupt, SIGTERM with Terminated; then, as after any error, nothing is left.
    """
    if n_jobs < 1:
        raise ConfigError(f"worker processes: at least 1 is expected, {n_jobs} came")
    target = Path(os.path.realpath(store))
    check_target(target, force=force)
    with interruption() as asked, open_checkpoint(checkpoint) as source:
        plan = plan_store(source, config)
        _check_disk_space(target, plan, source, config)
        with staged(target, force=force) as staging:
            job = Job(str(checkpoint.absolute()), str(staging.path), str(target), config, plan.digest)
            with new_record_files(staging.path, target, plan.files) as files:
                told = _ProgressReport(source, plan.source_nbytes, on_progress)
                records = encode_records(plan, job, asked, n_jobs=n_jobs, on_written=told.add)
                for file in plan.files:
                    asked.check()
                    files.sync(file.name)
            manifest = _manifest(plan, records, source, config)
            for name, data in source.side_files.items():
                write_file(staging.path, target, name, data)
            write_file(staging.path, target, MANIFEST_FILE, dump_manifest(manifest))
            asked.check()
            staging.commit(force=force)
    return manifest


class _ProgressReport:
    """Counts what is written and tells the caller."""

    def __init__(self, source: Checkpoint, total_nbytes: int, on_progress: Callable[[Progress], None]) -> None:
        self._source = source
        self._total_nbytes = total_nbytes
        self._on_progress = on_progress
        self._done_nbytes = 0

    def add(self, record: PlannedRecord, index: int) -> None:
        """Take down that one matrix of a record is written."""
        matrix = record.matrices[index]
        self._done_nbytes += self._source.nbytes(matrix)
        self._on_progress(Progress(self._done_nbytes, self._total_nbytes, matrix.hub_name))


def _check_disk_space(target: Path, plan: StorePlan, source: Checkpoint, config: QuantizeConfig) -> None:
    """Raise NoDiskSpace unless the store fits beside what is there: a store to be replaced stays until the end."""
    records = {
        planned.name: WrittenRecord(
            Record(R8, planned.parts, planned.file, planned.offset, planned.nbytes, _NO_CHECKSUM),
            (_NO_ERROR,) * len(planned.parts),
        )
        for planned in plan.records
    }
    manifest_nbytes = len(dump_manifest(_manifest(plan, records, source, config)))
    need_nbytes = sum(file.nbytes for file in plan.files) + sum(map(len, source.side_files.values())) + manifest_nbytes
    with disk_errors(target):
        free_nbytes = shutil.disk_usage(target.parent).free
    if need_nbytes > free_nbytes:
        raise NoDiskSpace(
            f"{target}: the store needs {need_nbytes / 1e6:.1f} MB, {target.parent} has {free_nbytes / 1e6:.1f} MB free"
        )


def _manifest(
    plan: StorePlan, written: dict[str, WrittenRecord], source: Checkpoint, config: QuantizeConfig
) -> Manifest:
    """Return the manifest in the plan's order, whatever order the records were finished in."""
    records = {name: entry.record for name, entry in written.items()}
    return Manifest(
        model=model_facts(source.config),
        schemes=_schemes(plan, records),
        solver=config.solver,
        experts={planned.key: records[planned.name] for planned in plan.records if planned.key is not None},
        dense={planned.name: records[planned.name] for planned in plan.records if planned.key is None},
        files=tuple(
            SideFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in source.side_files.items()
        ),
        weight_errors={planned.name: written[planned.name].weight_errors for planned in plan.records},
    )


def _schemes(plan: StorePlan, records: dict[str, Record]) -> TensorSchemes:
    """Return the scheme that most of each class have, the first of several; a tied head is the embedding."""
    counts: dict[TensorClass, Counter[str]] = defaultdict(Counter)
    for planned in plan.records:
        counts[planned.tensor_class][records[planned.name].parts[0].scheme] += 1
    most = {tensor_class: count.most_common(1)[0][0] for tensor_class, count in counts.items()}
    return TensorSchemes(
        experts=most["experts"],
        attention=most["attention"],
        head=most.get("head", most["other"]),
        other=most["other"],
    )
