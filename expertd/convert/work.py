"""What is left to do of a store: hands out records and shards, takes down what is done, tells how far it is.

Deletes shards that were fetched for this store alone as soon as nothing needs them. Runs in one thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertd.convert.checkpoint import Checkpoint
from expertd.convert.fetch_messages import Fetched, FetchJob, FetchProgress, FetchTrouble
from expertd.convert.journal import Journal
from expertd.convert.memory import record_need_nbytes
from expertd.convert.plan import PlannedRecord, StorePlan
from expertd.convert.schedule import Schedule
from expertd.convert.shard import Shard
from expertd.convert.staging import Staging, disk_errors
from expertd.convert.worker_messages import Done, MatrixDone, RecordDone, Task, task_for

# Shards that are here whole when space is to be saved: one that is worked on, one that waits. A third is on its way.
N_SHARDS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is, in bytes of the checkpoint's weights; `tensor` was finished last.

    `fetched_nbytes` are here of `to_fetch_nbytes` that had to come from elsewhere.
    """

    done_nbytes: int
    total_nbytes: int
    tensor: str
    fetched_nbytes: int = 0
    to_fetch_nbytes: int = 0


class StoreWork:
    """The work of one run. `paths` are the shards that are on this disk from the beginning; what workers hold together
    stays below the budget. `say` is given lines for the user.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: StorePlan,
        journal: Journal,
        staging: Staging,
        *,
        paths: dict[str, str],
        fetch_job: FetchJob | None,
        budget_nbytes: int,
        on_progress: Callable[[Progress], None],
        say: Callable[[str], None],
    ) -> None:
        self._checkpoint, self._plan, self._journal, self._staging = checkpoint, plan, journal, staging
        self._on_progress, self._say = on_progress, say
        self._paths = dict(paths)
        self._ours: set[str] = set()
        self._fetches_into_folder = fetch_job is not None and fetch_job.folder is not None
        needs = {
            number: frozenset(shard.name for shard in self._shards_of(planned))
            for number, planned in enumerate(plan.records)
            if number not in journal.done
        }
        self.n_left = len(needs)
        shards = {shard.name: shard for planned in plan.records for shard in self._shards_of(planned)}
        self._shards = {name: shards[name] for name in sorted(shards)}
        self._schedule = Schedule(
            needs,
            list(self._shards),
            here=frozenset(paths),
            n_ahead=N_SHARDS_AHEAD if self._fetches_into_folder else None,
            costs={number: record_need_nbytes(plan.records[number], checkpoint) for number in needs},
            budget=budget_nbytes,
        )
        finished = [matrix for number in journal.done for matrix in plan.records[number].matrices]
        self._done_nbytes, self._tensor = sum(map(checkpoint.nbytes, finished)), ""
        wanted = frozenset().union(*needs.values()) - paths.keys()
        self._to_fetch_nbytes = sum(self._shards[name].nbytes for name in wanted)
        self._fetched_nbytes: dict[str, int] = {}
        staging.keeps = bool(finished)

    @property
    def is_done(self) -> bool:
        """Whether every record is written."""
        return self._schedule.is_done

    def next_task(self) -> Task | None:
        """Return a record to write, None while there is none whose shards are here."""
        number = self._schedule.next_record()
        if number is None:
            return None
        return task_for(number, self._plan.records[number], self._checkpoint, self._paths)

    def next_shard(self) -> Shard | None:
        """Return a shard to fetch, None while there is none."""
        name = self._schedule.next_shard()
        if name is None:
            return None
        # What comes into the working folder is worth keeping, too.
        self._staging.keeps |= self._fetches_into_folder
        return self._shards[name]

    def take(self, event: Done) -> None:
        """Take down what was done."""
        match event:
            case MatrixDone(record, index):
                matrix = self._plan.records[record].matrices[index]
                self._done_nbytes, self._tensor = self._done_nbytes + self._checkpoint.nbytes(matrix), matrix.hub_name
                self._tell()
            case RecordDone(record):
                self._journal.add(event)
                self._staging.keeps = True
                for name in self._schedule.finish(record):
                    self._discard(name)
            case FetchProgress(name, nbytes):
                self._fetched_nbytes[name] = nbytes
                self._tell()
            case FetchTrouble(line):
                self._say(line)
            case Fetched(name, path, is_ours):
                self._paths[name] = path
                self._fetched_nbytes[name] = self._shards[name].nbytes
                if is_ours:
                    self._ours.add(name)
                self._schedule.take_shard(name)
                self._tell()

    def _tell(self) -> None:
        fetched_nbytes = sum(self._fetched_nbytes.values())
        self._on_progress(
            Progress(self._done_nbytes, self._plan.source_nbytes, self._tensor, fetched_nbytes, self._to_fetch_nbytes)
        )

    def _discard(self, name: str) -> None:
        if name in self._ours:
            with disk_errors(self._staging.target):
                Path(self._paths[name]).unlink(missing_ok=True)

    def _shards_of(self, planned: PlannedRecord) -> list[Shard]:
        return [self._checkpoint.place_of(matrix).shard for matrix in planned.matrices]
