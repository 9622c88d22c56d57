"""What the converter and its worker processes say to each other: JSON, one message a line, over a socket pair.

converter → worker   a Job in the command line, then the number of a planned record a line; the end of input ends it
worker → converter   MatrixDone for each matrix, RecordDone for each record; Failed, and the worker ends

Both sides are this program: messages are trusted.
"""

import json
from dataclasses import asdict, dataclass

from expertd.convert import errors
from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import ConvertError


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker must know to plan the same store; `plan_digest` tells it whether it has."""

    checkpoint: str
    folder: str
    target: str
    config: QuantizeConfig
    plan_digest: str


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


Event = MatrixDone | RecordDone | Failed


def dump_job(job: Job) -> str:
    """Return the job as JSON."""
    return json.dumps(asdict(job))


def load_job(text: str) -> Job:
    """Return the job in that JSON."""
    document = json.loads(text)
    return Job(**document | {"config": QuantizeConfig(**document["config"])})


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
        case ["Failed", kind, detail]:
            return Failed(kind, detail)
        case other:
            raise ValueError(f"no event of a worker: {other!r:.80}")
