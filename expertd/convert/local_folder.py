"""The files of a checkpoint in a folder on this disk. Knows no names of files; holds nothing open."""

from dataclasses import dataclass
from pathlib import Path

from expertd.convert.errors import CheckpointError, MalformedCheckpoint
from expertd.convert.json_file import read_bounded
from expertd.convert.safetensors_header import TensorSlot, read_header
from expertd.convert.shard import Shard, shard_of_file


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder; every method raises CheckpointError for what cannot be read."""

    folder: Path

    @property
    def place(self) -> str:
        """The folder, for error lines."""
        return str(self.folder)

    def names(self) -> frozenset[str]:
        """Return the names of everything in the folder."""
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder}: no such folder; the local folder of a Mixtral checkpoint is expected"
            )
        try:
            return frozenset(path.name for path in self.folder.iterdir())
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read ({error.strerror})") from None

    def read(self, name: str, nbytes_max: int) -> bytes:
        """Return a file that is no longer than that."""
        return read_bounded(self.folder / name, nbytes_max)

    def read_header(self, name: str) -> tuple[Shard, dict[str, TensorSlot]]:
        """Return a file of weights and the tensors in it, from its header alone."""
        path = self.folder / name
        if not path.exists():
            raise MalformedCheckpoint(f"{name}: the shard is missing; fetch the checkpoint again")
        if not path.is_file():
            raise MalformedCheckpoint(f"{name}: a regular file is expected")
        try:
            with path.open("rb") as file:
                return shard_of_file(name, file.fileno()), read_header(file, name)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None

    def paths(self) -> dict[str, str]:
        """Return the paths of all files by name."""
        return {name: str(self.folder.absolute() / name) for name in self.names()}

    def fetch_job(self, folder: Path | None) -> None:
        """Return None: everything is here."""
        del folder
