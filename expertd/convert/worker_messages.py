"""What the converter and its worker processes say to each other: JSON, one message a line, over a socket pair.

converter → worker   a Job in the command line, then a Task a line; the end of input ends it
worker → converter   MatrixDone for each matrix, RecordDone for each record; Failed, and the worker ends

Events of the process that fetches shards (fetch_messages) come the same way.

Both sides are this program: messages are trusted.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from expertd.convert import errors
from expertd.convert.checkpoint import Checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import ConvertError
from expertd.convert.fetch_messages import Fetched, FetchProgress, FetchTrouble
from expertd.convert.hqq_layout import HqqPlace, MatrixPlace, Order
from expertd.convert.plan import PlannedRecord
from expertd.convert.safetensors_header import TensorSlot
from expertd.convert.shard import Shard, TensorPlace
from protocol.layout import Part


@dataclass(frozen=True, slots=True)
class Job:
    """What holds for all of a worker's tasks: where the record files lie, and how to encode.

    `target` is where the store will stand, for error lines; `files` are the names of the record files.
    """

    folder: str
    target: str
    files: tuple[str, ...]
    config: QuantizeConfig


@dataclass(frozen=True, slots=True)
class MatrixSource:
    """A matrix as the checkpoint has it: its name there, the path of its shard on this disk, and its place."""

    hub_name: str
    path: str
    place: MatrixPlace


@dataclass(frozen=True, slots=True)
class Task:
    """One record to write: its number in the plan, its place in the store, its parts and what each is made of."""

    record: int
    file: str
    offset: int
    nbytes: int
    parts: tuple[Part, ...]
    matrices: tuple[MatrixSource, ...]


@dataclass(frozen=True, slots=True)
class MatrixDone:
    """One matrix of a record is written."""

    record: int
    matrix: int


@dataclass(frozen=True, slots=True)
class RecordDone:
    """A record is written: the schemes its weights allowed, what each part lost, and the checksum of its bytes."""

    record: int
    schemes: tuple[str, ...]
    weight_errors: tuple[float, ...]
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The converter's error that ended the worker: its class and its line."""

    kind: str
    detail: str

    def error(self) -> ConvertError:
        """Return the error as it was raised."""
        cls: type[ConvertError] = getattr(errors, self.kind)
        return cls(self.detail)


Done = MatrixDone | RecordDone | FetchProgress | FetchTrouble | Fetched
Event = Done | Failed


def task_for(number: int, planned: PlannedRecord, checkpoint: Checkpoint, paths: Mapping[str, str]) -> Task:
    """Return the task of writing the plan's record of that number; `paths` says where each shard is on this disk."""
    places = [checkpoint.place_of(matrix) for matrix in planned.matrices]
    matrices = tuple(
        MatrixSource(matrix.hub_name, paths[place.shard.name], place)
        for matrix, place in zip(planned.matrices, places, strict=True)
    )
    return Task(number, planned.file, planned.offset, planned.nbytes, planned.parts, matrices)


def dump_job(job: Job) -> str:
    """Return the job as JSON."""
    return json.dumps(asdict(job))


def load_job(text: str) -> Job:
    """Return the job in that JSON."""
    document = json.loads(text)
    return Job(**document | {"files": tuple(document["files"]), "config": QuantizeConfig(**document["config"])})


def dump_task(task: Task) -> bytes:
    """Return the task as a line."""
    return json.dumps(asdict(task)).encode() + b"\n"


def load_task(line: str) -> Task:
    """Return the task in that line."""
    document = json.loads(line)
    parts = tuple(Part(**part) for part in document["parts"])
    matrices = tuple(
        MatrixSource(item["hub_name"], item["path"], _load_place(item["place"])) for item in document["matrices"]
    )
    return Task(**document | {"parts": parts, "matrices": matrices})


def dump_event(event: Event) -> bytes:
    """Return the event as a line."""
    return json.dumps([type(event).__name__, *asdict(event).values()]).encode() + b"\n"


def load_event(line: bytes) -> Event:
    """Return the event in that line."""
    match json.loads(line):
        case ["MatrixDone", record, matrix]:
            return MatrixDone(record, matrix)
        case ["RecordDone", record, schemes, weight_errors, checksum]:
            return RecordDone(record, tuple(schemes), tuple(weight_errors), checksum)
        case ["FetchProgress", shard, nbytes]:
            return FetchProgress(shard, nbytes)
        case ["FetchTrouble", text]:
            return FetchTrouble(text)
        case ["Fetched", shard, path, is_ours]:
            return Fetched(shard, path, is_ours)
        case ["Failed", kind, detail]:
            return Failed(kind, detail)
        case other:
            raise ValueError(f"no event of a worker: {other!r:.80}")


def _load_place(document: dict[str, Any]) -> MatrixPlace:
    if "codes" not in document:
        return _load_tensor_place(document)
    tensors = {"codes": _load_tensor_place(document["codes"])}
    values = {word: tuple(map(_load_tensor_place, document[word])) for word in ("scale", "zero")}
    return HqqPlace(**document | tensors | values | {"order": Order(document["order"])})


def _load_tensor_place(document: dict[str, dict[str, Any]]) -> TensorPlace:
    slot = document["slot"]
    return TensorPlace(Shard(**document["shard"]), TensorSlot(**slot | {"shape": tuple(slot["shape"])}))
