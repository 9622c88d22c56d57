"""What the converter and the process that fetches its shards say to each other; see worker_messages for how.

converter → fetcher   a FetchJob in the command line, then a Shard a line; the end of input ends it
fetcher → converter   FetchProgress now and then, FetchTrouble when it has to ask again, Fetched for each shard;
                      Failed, and the fetcher ends
"""

import json
from dataclasses import asdict, dataclass

from expertd.convert.shard import Shard


@dataclass(frozen=True, slots=True)
class FetchJob:
    """Where shards come from, and the folder that they go to; None is the user's cache of the Hub."""

    endpoint: str | None
    repo_id: str
    commit: str
    folder: str | None


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """So many bytes of a shard are here."""

    shard: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class FetchTrouble:
    """What keeps a shard from coming, and what is done about it, in a line."""

    line: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """A shard is here whole; `is_ours` says whether it was fetched for this store alone, into the job's folder."""

    shard: str
    path: str
    is_ours: bool


def dump_fetch_job(job: FetchJob) -> str:
    """Return the job as JSON."""
    return json.dumps(asdict(job))


def load_fetch_job(text: str) -> FetchJob:
    """Return the job in that JSON."""
    return FetchJob(**json.loads(text))


def dump_shard(shard: Shard) -> bytes:
    """Return the shard to fetch as a line."""
    return json.dumps(asdict(shard)).encode() + b"\n"


def load_shard(line: str) -> Shard:
    """Return the shard in that line."""
    return Shard(**json.loads(line))
