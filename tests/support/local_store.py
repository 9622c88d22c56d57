"""A store without a daemon: its files read into this process's memory. For tests of what runs above the attachment."""

import hashlib
from collections.abc import Collection
from pathlib import Path

from protocol.handles import ExpertKey
from protocol.manifest import MANIFEST_FILE, Manifest, Record, load_manifest
from runner.errors import CorruptExpert, StoreInvalid


class LocalStore:
    """A StoreView over the files of a store directory; the experts of `corrupt` are refused as a daemon would."""

    def __init__(self, store_dir: Path, *, corrupt: Collection[ExpertKey] = ()) -> None:
        self._dir = store_dir
        self._corrupt = corrupt
        self._files: dict[str, bytearray] = {}
        self._manifest = load_manifest((store_dir / MANIFEST_FILE).read_bytes())
        self.touched: set[ExpertKey] = set()

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def host_slots(self) -> None:
        return None

    def tend(self, now: float) -> None:
        """Do nothing: there is no daemon that could be replaced."""

    def expert_record(self, key: ExpertKey) -> memoryview:
        if key in self._corrupt:
            raise CorruptExpert(f"{key}: its bytes do not match their checksum")
        self.touched.add(key)
        return self._record(self._manifest.experts[key])

    def dense_record(self, name: str) -> memoryview:
        if name not in self._manifest.dense:
            raise StoreInvalid(f"the store has no dense tensor {name!r}")
        return self._record(self._manifest.dense[name])

    def side_file(self, name: str) -> bytes | None:
        listed = {file.name: file for file in self._manifest.files}.get(name)
        if listed is None:
            return None
        data = (self._dir / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != listed.sha256:
            raise StoreInvalid(f"{name}: its sha256 is not the manifest's")
        return data

    def _record(self, record: Record) -> memoryview:
        if record.file not in self._files:
            self._files[record.file] = bytearray((self._dir / record.file).read_bytes())
        return memoryview(self._files[record.file])[record.offset : record.offset + record.nbytes]
