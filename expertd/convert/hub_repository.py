"""A checkpoint in a repository on the Hub: its small files whole, its shards' headers by range requests.

No shard is fetched here: `fetcher.py` does that, in a process of its own, when the plan is made.
"""

import io
import struct
from dataclasses import dataclass, field
from pathlib import Path

from expertd.convert.errors import MalformedCheckpoint
from expertd.convert.fetch_messages import FetchJob
from expertd.convert.hub import Hub, HubFile, Repository
from expertd.convert.safetensors_header import HEADER_NBYTES_MAX, TensorSlot, read_header_of
from expertd.convert.shard import Shard

# Most headers are shorter; the rest of a longer one takes a second request.
_FIRST_NBYTES = 32 << 10
_LENGTH_NBYTES = 8


@dataclass(frozen=True, slots=True)
class HubRepository:
    """The files of one commit; every method raises CheckpointError or FetchFailed."""

    hub: Hub
    repository: Repository
    files: dict[str, HubFile] = field(repr=False)

    @property
    def place(self) -> str:
        """The repository, for error lines."""
        return self.repository.repo_id

    def names(self) -> frozenset[str]:
        """Return the names of the files that lie in no folder."""
        return frozenset(name for name in self.files if "/" not in name)

    def read(self, name: str, nbytes_max: int) -> bytes:
        """Return a file that is no longer than that."""
        nbytes = self.files[name].nbytes
        if nbytes > nbytes_max:
            raise MalformedCheckpoint(f"{self.place}: {name}: {nbytes} bytes, at most {nbytes_max} are expected of it")
        return self.hub.read(self.repository, name, 0, nbytes)

    def read_header(self, name: str) -> tuple[Shard, dict[str, TensorSlot]]:
        """Return a file of weights and the tensors in it, from its header alone."""
        file = self.files[name]
        data = self.hub.read(self.repository, name, 0, min(_FIRST_NBYTES, file.nbytes))
        if len(data) >= _LENGTH_NBYTES:
            end = _LENGTH_NBYTES + int(struct.unpack_from("<Q", data)[0])
            if len(data) < end <= min(file.nbytes, _LENGTH_NBYTES + HEADER_NBYTES_MAX):
                data += self.hub.read(self.repository, name, len(data), end)
        slots = read_header_of(io.BytesIO(data), name, file.nbytes)
        return Shard(name, file.nbytes, etag=file.etag), slots

    def paths(self) -> dict[str, str]:
        """Return nothing: whether a shard is here already its fetcher finds out."""
        return {}

    def fetch_job(self, folder: Path | None) -> FetchJob:
        """Return what a fetcher must know to fetch shards, into that folder or into the user's cache of the Hub."""
        return FetchJob(
            self.hub.endpoint, self.repository.repo_id, self.repository.commit, None if folder is None else str(folder)
        )


def find_repository(hub: Hub, repo_id: str, revision: str | None) -> HubRepository:
    """Return what that revision is now; raise NotOnHub or FetchFailed."""
    repository, files = hub.list_files(repo_id, revision)
    return HubRepository(hub, repository, {file.name: file for file in files})
