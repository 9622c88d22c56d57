"""From a checkpoint to a store: check, plan, reserve, encode, commit. The converter's front door.

Everything that can be refused is refused before a weight is read. The store appears at its place whole or not at all;
what a run that ended early has finished stays beside it for the next one, which goes on from there.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from expertd.convert.checkpoint import Checkpoint, CheckpointFiles, check_checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import ConfigError, ConvertError, EncodeFailed, NoDiskSpace, NotFinite
from expertd.convert.interruption import Interruption, interruption
from expertd.convert.journal import open_journal
from expertd.convert.local_folder import LocalFolder
from expertd.convert.memory import LIMIT_NBYTES, Crew, crew_of
from expertd.convert.plan import StorePlan, plan_store
from expertd.convert.staging import Staging, check_target, disk_errors, kept_nbytes, staged
from expertd.convert.work import Progress, StoreWork
from expertd.convert.worker_messages import Job
from expertd.convert.worker_pool import do_work
from expertd.convert.writer import record_files_with_headers, write_file
from expertd.convert.written import WrittenRecord, store_manifest, written
from protocol.layout import R8
from protocol.manifest import MANIFEST_FILE, Manifest, Record, dump_manifest
from protocol.version import LIBRARY_VERSION, STORE_FORMAT_VERSION

# Of the right length, or as long as there is: what a manifest weighs is known before checksums and errors are.
_NO_CHECKSUM = "0" * 32
_NO_ERROR = 1.2345e-05


@dataclass(frozen=True, slots=True)
class _Order:
    """A store to be made: where, of what, as what, and with how much effort."""

    target: Path
    files: CheckpointFiles
    source: Checkpoint
    plan: StorePlan
    config: QuantizeConfig
    crew: Crew
    discards: bool
    on_progress: Callable[[Progress], None]
    say: Callable[[str], None]

    @property
    def made_of(self) -> str:
        """What tells it from another one: what was finished of one is no part of another."""
        places = [self.source.place_of(matrix) for planned in self.plan.records for matrix in planned.matrices]
        facts = (LIBRARY_VERSION, STORE_FORMAT_VERSION, self.config, self.plan.records, places)
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def _ignore(_line: str) -> None:
    """Say it to nobody."""


@dataclass(frozen=True, slots=True)
class Made:
    """A store that was made, and how many of the checkpoint's matrices were quantized before."""

    manifest: Manifest
    n_quantized_before: int


def quantize_checkpoint(
    checkpoint: Path,
    store: Path,
    config: QuantizeConfig,
    *,
    force: bool,
    n_jobs: int | None,
    on_progress: Callable[[Progress], None],
) -> Manifest:
    """Write the store of a checkpoint in a local folder, as quantize_source does."""
    files = LocalFolder(checkpoint)
    return quantize_source(files, store, config, force=force, n_jobs=n_jobs, on_progress=on_progress).manifest


def quantize_source(
    files: CheckpointFiles,
    store: Path,
    config: QuantizeConfig,
    *,
    force: bool,
    n_jobs: int | None,
    discards: bool = False,
    on_progress: Callable[[Progress], None],
    say: Callable[[str], None] = _ignore,
) -> Made:
    """Write the store of a checkpoint with `n_jobs` worker processes; return what was made; raise ConvertError.

    None are as many as there are processors for and as fit into memory.LIMIT_NBYTES, which then bounds all processes;
    what a number that does not fit takes is told. `on_progress` is called in the calling thread after every matrix,
    `say` with lines for the user. In the main thread SIGINT ends the work with
    KeyboardInterrupt, SIGTERM with Terminated; then, as after most errors, what is finished is kept for the next run.
    With `discards` shards that have to be fetched are deleted after their use.
    """
    if n_jobs is not None and n_jobs < 1:
        raise ConfigError(f"worker processes: at least 1 is expected, {n_jobs} came")
    target = Path(os.path.realpath(store))
    check_target(target, force=force)
    # Not inside the block below: before there is anything to clean up, Ctrl-C need not wait for the network.
    source = check_checkpoint(files)
    plan = plan_store(source, config)
    crew = crew_of(plan, source, n_asked=n_jobs, n_processors=len(os.sched_getaffinity(0)))
    order = _Order(target, files, source, plan, config, crew, discards, on_progress, say)
    _check_disk_space(order)
    _tell_memory(order)
    with interruption() as asked, staged(target, force=force, made_of=order.made_of) as staging, _kept(staging):
        records = _write_records(order, staging, asked)
        manifest = store_manifest(order.plan, records, source, config)
        _clear_but_records(staging.path, order.plan)
        for name, data in source.side_files.items():
            write_file(staging.path, target, name, data)
        write_file(staging.path, target, MANIFEST_FILE, dump_manifest(manifest))
        asked.check()
        staging.commit(force=force)
    return Made(manifest, source.n_quantized)


@contextmanager
def _kept(staging: Staging) -> Iterator[None]:
    """Say so where what is finished is kept; drop it where these weights can never become this store."""
    try:
        yield
    except (NotFinite, EncodeFailed):
        staging.keeps = False
        raise
    except ConvertError as error:
        if staging.is_kept:
            raise type(error)(f"{error}; what is finished is kept, and the same command goes on from there") from None
        raise


def _write_records(order: _Order, staging: Staging, asked: Interruption) -> dict[str, WrittenRecord]:
    """Have all records written that are not yet; return what the manifest says of each by name."""
    target, plan = order.target, order.plan
    names = tuple(file.name for file in plan.files)
    job = Job(str(staging.path), str(target), names, order.config)
    fetch_job = order.files.fetch_job(staging.folder / "source" if order.discards else None)
    with (
        record_files_with_headers(staging.path, target, plan.files) as record_files,
        open_journal(staging, plan.records, asked) as journal,
    ):
        work = StoreWork(
            order.source,
            plan,
            journal,
            staging,
            paths=order.files.paths(),
            fetch_job=fetch_job,
            budget_nbytes=order.crew.budget_nbytes,
            on_progress=order.on_progress,
            say=order.say,
        )
        do_work(work, job, fetch_job, asked, n_jobs=min(order.crew.n_jobs, work.n_left))
        for name in names:
            asked.check()
            record_files.sync(name)
        return {plan.records[number].name: written(plan.records[number], done) for number, done in journal.done.items()}


def _tell_memory(order: _Order) -> None:
    """Say so where the workers that were asked for take more than the limit."""
    if order.crew.held_nbytes > LIMIT_NBYTES:
        order.say(
            f"{order.crew.n_jobs} workers hold up to {order.crew.held_nbytes / 1e9:.1f} GB of memory together; "
            f"without --jobs it is at most {LIMIT_NBYTES / 1e9:.0f} GB"
        )


def _clear_but_records(folder: Path, plan: StorePlan) -> None:
    """Remove what a run before may have written beside the records: its side files and its manifest."""
    names = {file.name for file in plan.files}
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def _check_disk_space(order: _Order) -> None:
    """Raise NoDiskSpace unless what is missing fits beside what is there; a store to be replaced stays till the end."""
    target, plan = order.target, order.plan
    records = {
        planned.name: WrittenRecord(
            Record(R8, planned.parts, planned.file, planned.offset, planned.nbytes, _NO_CHECKSUM),
            (_NO_ERROR,) * len(planned.parts),
        )
        for planned in plan.records
    }
    manifest_nbytes = len(dump_manifest(store_manifest(plan, records, order.source, order.config)))
    side_nbytes = sum(map(len, order.source.side_files.values()))
    need_nbytes = sum(file.nbytes for file in plan.files) + side_nbytes + manifest_nbytes
    with disk_errors(target):
        free_nbytes = shutil.disk_usage(target.parent).free
    need_nbytes -= kept_nbytes(target, order.made_of)
    if need_nbytes > free_nbytes:
        raise NoDiskSpace(
            f"{target}: the store needs {need_nbytes / 1e6:.1f} MB, {target.parent} has {free_nbytes / 1e6:.1f} MB free"
        )
